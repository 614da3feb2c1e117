"""A bundle: one folder with everything inference needs, in a layout that open_clip reads too."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlm.calibration import Calibration, calibration_from_record
from vlm.errors import CheckpointError, TokenizerError, VlmError
from vlm.files import sha256_of, write_file, write_folder
from vlm.images.transforms import evaluation_transform
from vlm.models.build import build_encoder
from vlm.models.dual_encoder import DualEncoder
from vlm.models.multiway import MultiwayEncoder
from vlm.text.tokenizer import Tokenizer, load_tokenizer

FORMAT_VERSION = 1

# The first and the last name are open_clip's; its `local-dir:` scheme looks for them.
_OPEN_CLIP_CONFIG = "open_clip_config.json"
_MODEL_CONFIG = "model_config.json"  # of what open_clip has not
_WEIGHTS = "open_clip_model.safetensors"
_TOKENIZER = "tokenizer"
_DESCRIPTION = "vlm.json"
_OUR_SCALE, _OPEN_CLIP_SCALE = "log_logit_scale", "logit_scale"


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A trained model with the tokenizer and picture transform it was trained with."""

    model: DualEncoder | MultiwayEncoder
    tokenizer: Tokenizer
    transform: Callable[[Image.Image], Float[Tensor, "3 height width"]]
    languages: tuple[str, ...]
    """Languages of the training captions."""
    model_cfg: Mapping[str, Any]
    """open_clip's description of the model, or that of a multiway one: see `build_encoder`."""
    preprocess_cfg: Mapping[str, Any]
    """open_clip's description of the picture transform."""
    first_new_id: int | None = None
    """The first id whose row of the embedding has not been trained yet; None where all have."""
    truncate_dims: tuple[int, ...] = ()
    """Widths at which features cut to their first numbers were trained as well (Matryoshka)."""
    calibration: Calibration | None = None
    """What the cosine of a text and a picture says of a match; None where it was not fitted."""
    fingerprint: str
    """SHA-256 of the weights; two bundles with one fingerprint give the same embeddings."""


def save_bundle(
    folder: Path,
    *,
    model: DualEncoder | MultiwayEncoder,
    model_cfg: Mapping[str, Any],
    preprocess_cfg: Mapping[str, Any],
    tokenizer: Tokenizer,
    languages: tuple[str, ...],
    first_new_id: int | None = None,
    truncate_dims: tuple[int, ...] = (),
) -> None:
    """Write a bundle, whole or not at all.

    Args:
        folder: Where to; a bundle already there is replaced.
        model: The model whose weights are written, as float32.
        model_cfg: The description from which `build_encoder` builds the model.
        preprocess_cfg: open_clip's description of the picture transform.
        tokenizer: The tokenizer the model was trained with.
        languages: Languages of the training captions.
        first_new_id: The first id of a grown vocabulary, where its rows are not trained yet.
        truncate_dims: Smaller widths that features were trained at as well.
    """
    weights = {
        _OPEN_CLIP_SCALE if name == _OUR_SCALE else name: tensor.contiguous().cpu()
        for name, tensor in model.state_dict().items()
    }
    their_cfg, hf_config = _without_hf_config(model_cfg)
    description = {
        "format": FORMAT_VERSION,
        "vlm": version("vlm"),
        "languages": list(languages),
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "context_length": tokenizer.context_length,
        },
    } | _given(
        first_new_id=first_new_id, truncate_dims=list(truncate_dims) or None, hf_config=hf_config
    )
    with write_folder(folder) as temporary:
        save_file(weights, temporary / _WEIGHTS)
        config = {"model_cfg": their_cfg, "preprocess_cfg": dict(preprocess_cfg)}
        name = _MODEL_CONFIG if "multiway" in model_cfg else _OPEN_CLIP_CONFIG
        _write_json(temporary / name, config)
        tokenizer.save(temporary / _TOKENIZER)
        _write_json(temporary / _DESCRIPTION, description)


def is_bundle(folder: Path) -> bool:
    """Tell whether a folder says that it is a bundle."""
    return (folder / _DESCRIPTION).is_file()


def load_bundle(folder: Path) -> Bundle:
    """Read a bundle, without the network and without running anything it holds.

    Raises:
        CheckpointError: the folder is no bundle, or a part is missing or damaged.
        TokenizerError: the tokenizer is damaged, or not the one that the model was trained with.
    """
    if not is_bundle(folder):
        raise CheckpointError(f"{folder} is not a bundle: it has no {_DESCRIPTION}")
    description = _read_json(folder / _DESCRIPTION)
    ours = (folder / _MODEL_CONFIG).is_file()
    config_path = folder / (_MODEL_CONFIG if ours else _OPEN_CLIP_CONFIG)
    config = _read_json(config_path)
    try:
        format_version = description["format"]
        fingerprint = str(description["tokenizer"]["fingerprint"])
        languages = tuple(description["languages"])
        truncate_dims = tuple(description.get("truncate_dims", ()))
        model_cfg = _with_hf_config(config["model_cfg"], description.get("hf_config"))
        preprocess_cfg = config["preprocess_cfg"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"the descriptions in {folder} lack {error}") from error
    if format_version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has bundle format {format_version}; this version reads {FORMAT_VERSION}"
        )
    tokenizer = load_tokenizer(folder / _TOKENIZER)
    if tokenizer.fingerprint != fingerprint:
        raise TokenizerError(
            f"{folder} holds another tokenizer ({tokenizer.fingerprint[:12]}) than its model was "
            f"trained with ({fingerprint[:12]})"
        )
    try:
        model = build_encoder(model_cfg)
        transform = evaluation_transform(preprocess_cfg)
    except (VlmError, ValueError, LookupError, TypeError, ArithmeticError, AssertionError) as error:
        raise CheckpointError(
            f"{config_path} describes no model or transform: {type(error).__name__}: {error}"
        ) from error
    _load_weights(model, folder / _WEIGHTS)
    weights_fingerprint = sha256_of(folder / _WEIGHTS)
    return Bundle(
        model=model.eval(),
        tokenizer=tokenizer,
        transform=transform,
        languages=languages,
        model_cfg=model_cfg,
        preprocess_cfg=preprocess_cfg,
        first_new_id=description.get("first_new_id"),
        truncate_dims=truncate_dims,
        calibration=_calibration_of(folder, description, weights_fingerprint),
        fingerprint=weights_fingerprint,
    )


def store_calibration(folder: Path, calibration: Calibration) -> None:
    """Write a calibration into a bundle, in the place of one that may be there.

    Raises:
        CheckpointError: the folder is no bundle, or the calibration is of other weights.
    """
    if not is_bundle(folder):
        raise CheckpointError(f"{folder} is not a bundle: it has no {_DESCRIPTION}")
    description = _read_json(folder / _DESCRIPTION) | {"calibration": calibration.record()}
    _calibration_of(folder, description, sha256_of(folder / _WEIGHTS))
    content = json.dumps(description, indent=2) + "\n"
    write_file(folder / _DESCRIPTION, content.encode())


def _calibration_of(
    folder: Path, description: Mapping[str, Any], fingerprint: str
) -> Calibration | None:
    record = description.get("calibration")
    if record is None:
        return None
    try:
        calibration = calibration_from_record(record)
    except VlmError as error:
        raise CheckpointError(f"cannot read {folder / _DESCRIPTION}: {error}") from error
    if calibration.fingerprint != fingerprint:
        raise CheckpointError(
            f"the calibration of {folder} is of other weights ({calibration.fingerprint[:12]}) "
            f"than its own ({fingerprint[:12]})"
        )
    return calibration


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _without_hf_config(
    model_cfg: Mapping[str, Any],
) -> tuple[dict[str, Any], Mapping[str, Any] | None]:
    """Split off what open_clip's description of a text tower of transformers has no place for."""
    text_cfg = model_cfg.get("text_cfg", {})
    if "hf_config" not in text_cfg:
        return dict(model_cfg), None
    rest = {name: value for name, value in text_cfg.items() if name != "hf_config"}
    return {**model_cfg, "text_cfg": rest}, text_cfg["hf_config"]


def _with_hf_config(
    model_cfg: Mapping[str, Any], hf_config: Mapping[str, Any] | None
) -> Mapping[str, Any]:
    if hf_config is None:
        return model_cfg
    return {**model_cfg, "text_cfg": {**model_cfg["text_cfg"], "hf_config": hf_config}}


def _load_weights(model: DualEncoder | MultiwayEncoder, path: Path) -> None:
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the weights {path}: {error}") from error
    if _OPEN_CLIP_SCALE in weights:
        weights[_OUR_SCALE] = weights.pop(_OPEN_CLIP_SCALE)
    expected = model.state_dict()
    wrong = sorted(
        name
        for name in weights.keys() | expected.keys()
        if name not in weights
        or name not in expected
        or weights[name].shape != expected[name].shape
    )
    if wrong:
        shown = ", ".join(wrong[:3]) + (", ..." if len(wrong) > 3 else "")
        raise CheckpointError(
            f"{path} does not fit its model: {len(wrong)} tensors are missing, unexpected or of "
            f"another shape ({shown})"
        )
    model.load_state_dict(weights)


def _write_json(path: Path, record: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return record
