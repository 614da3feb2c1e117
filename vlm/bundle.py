"""A bundle: one folder with everything inference needs, in a layout that open_clip reads too."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import vlm.models.quick_imports  # noqa: F401  # before what imports open_clip
from vlm.calibration import Calibration, calibration_from_record
from vlm.errors import CheckpointError, TokenizerError, VlmError
from vlm.files import sha256_of, write_file, write_folder
from vlm.images.transforms import evaluation_transform
from vlm.models.build import build_encoder
from vlm.models.encoder import Encoder
from vlm.text.auto_tokenizer import OWN_TOKENIZER, for_open_clip
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
    """A trained model with the tokenizer and image transform it was trained with."""

    model: Encoder
    tokenizer: Tokenizer
    transform: Callable[[Image.Image], Float[Tensor, "3 height width"]]
    languages: tuple[str, ...] = ()
    """Languages of the training captions."""
    model_cfg: Mapping[str, Any]
    """open_clip's description of the model, or that of a multiway one: see `build_encoder`."""
    preprocess_cfg: Mapping[str, Any]
    """open_clip's description of the image transform."""
    first_new_id: int | None = None
    """The first id whose row of the embedding has not been trained yet; None where all have."""
    truncate_dims: tuple[int, ...] = ()
    """Widths at which features cut to their first numbers were trained as well (Matryoshka)."""
    calibration: Calibration | None = None
    """What the cosine of a text and an image says of a match; None where it was not fitted."""
    fingerprint: str = ""
    """SHA-256 of all that vectors depend on: the weights, the descriptions of the model and of the
    image transform, the tokenizer. Two bundles with one fingerprint give the same embeddings.
    Empty for a model that is in no folder yet."""


def save_bundle(
    folder: Path,
    *,
    model: Encoder,
    model_cfg: Mapping[str, Any],
    preprocess_cfg: Mapping[str, Any],
    tokenizer: Tokenizer,
    languages: tuple[str, ...],
    first_new_id: int | None = None,
    truncate_dims: tuple[int, ...] = (),
) -> None:
    """Write a bundle, whole or not at all, in the place of one already there; see `Bundle`."""
    weights = {
        _OPEN_CLIP_SCALE if name == _OUR_SCALE else name: tensor.contiguous().cpu()
        for name, tensor in model.state_dict().items()
    }
    their_cfg, hf_config = _without_hf_config(model_cfg)
    fast_files: dict[str, bytes] = {}
    if "text_cfg" in their_cfg:
        their_cfg["text_cfg"], fast_files = for_open_clip(their_cfg["text_cfg"], tokenizer)
    description = {
        "format": FORMAT_VERSION,
        "vlm": version("vlm"),
        "languages": list(languages),
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "context_length": tokenizer.context_length,
        },
        "first_new_id": first_new_id,
        "truncate_dims": list(truncate_dims) or None,
        "hf_config": hf_config,
    }
    description = {name: value for name, value in description.items() if value is not None}
    with write_folder(folder) as temporary:
        save_file(weights, temporary / _WEIGHTS)
        config = {"model_cfg": their_cfg, "preprocess_cfg": dict(preprocess_cfg)}
        name = _MODEL_CONFIG if "multiway" in model_cfg else _OPEN_CLIP_CONFIG
        _write_json(temporary / name, config)
        tokenizer.save(temporary / _TOKENIZER)
        for name, content in fast_files.items():  # where open_clip's `get_tokenizer` looks
            (temporary / name).write_bytes(content)
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
    described = _read_descriptions(folder)
    tokenizer = load_tokenizer(folder / _TOKENIZER)
    if tokenizer.fingerprint != described.tokenizer:
        raise TokenizerError(
            f"{folder} holds another tokenizer ({tokenizer.fingerprint[:12]}) than its model was "
            f"trained with ({described.tokenizer[:12]})"
        )
    try:
        model = build_encoder(described.model_cfg)
        transform = evaluation_transform(described.preprocess_cfg)
    except (VlmError, ValueError, LookupError, TypeError, ArithmeticError, AssertionError) as error:
        raise CheckpointError(
            f"{folder / described.config_name} describes no model or transform: "
            f"{type(error).__name__}: {error}"
        ) from error
    _load_weights(model, folder / _WEIGHTS)
    fingerprint = _fingerprint_of(folder, described)
    return Bundle(
        model=model.eval(),
        tokenizer=tokenizer,
        transform=transform,
        languages=described.languages,
        model_cfg=described.model_cfg,
        preprocess_cfg=described.preprocess_cfg,
        first_new_id=described.ours.get("first_new_id"),
        truncate_dims=described.truncate_dims,
        calibration=_calibration_of(folder, described.ours, fingerprint),
        fingerprint=fingerprint,
    )


def store_calibration(folder: Path, calibration: Calibration) -> None:
    """Write a calibration into the bundle whose model it is of, in the place of an older one."""
    described = _read_descriptions(folder)
    description = described.ours | {"calibration": calibration.record()}
    _calibration_of(folder, description, _fingerprint_of(folder, described))
    content = json.dumps(description, indent=2) + "\n"
    write_file(folder / _DESCRIPTION, content.encode())


class _Descriptions(NamedTuple):
    """What the two JSON files of a bundle say."""

    ours: dict[str, Any]  # vlm.json, whole
    config_name: str  # the file with the following two
    model_cfg: Mapping[str, Any]
    preprocess_cfg: Mapping[str, Any]
    tokenizer: str  # fingerprint of the one that the model was trained with
    languages: tuple[str, ...]
    truncate_dims: tuple[int, ...]


def _read_descriptions(folder: Path) -> _Descriptions:
    if not is_bundle(folder):
        raise CheckpointError(f"{folder} is not a bundle: it has no {_DESCRIPTION}")
    ours = _read_json(folder / _DESCRIPTION)
    config_name = _MODEL_CONFIG if (folder / _MODEL_CONFIG).is_file() else _OPEN_CLIP_CONFIG
    config = _read_json(folder / config_name)
    try:
        format_version = ours["format"]
        described = _Descriptions(
            ours=ours,
            config_name=config_name,
            model_cfg=_with_hf_config(config["model_cfg"], ours.get("hf_config")),
            preprocess_cfg=config["preprocess_cfg"],
            tokenizer=str(ours["tokenizer"]["fingerprint"]),
            languages=tuple(ours["languages"]),
            truncate_dims=tuple(ours.get("truncate_dims", ())),
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"the descriptions in {folder} lack {error}") from error
    if format_version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has bundle format {format_version}; this version reads {FORMAT_VERSION}"
        )
    return described


def _fingerprint_of(folder: Path, described: _Descriptions) -> str:
    content = {
        "weights": sha256_of(folder / _WEIGHTS),
        "model_cfg": described.model_cfg,
        "preprocess_cfg": described.preprocess_cfg,
        "tokenizer": described.tokenizer,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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
            f"the calibration of {folder} is of another model ({calibration.fingerprint[:12]}) "
            f"than its own ({fingerprint[:12]})"
        )
    return calibration


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
    """Return the description as `save_bundle` was given it."""
    text_cfg = dict(model_cfg.get("text_cfg", {}))
    if text_cfg.get("hf_tokenizer_name") == OWN_TOKENIZER:
        del text_cfg["hf_tokenizer_name"], text_cfg["tokenizer_kwargs"]
    if hf_config is not None:
        text_cfg["hf_config"] = hf_config
    return {**model_cfg, "text_cfg": text_cfg} if text_cfg else model_cfg


def _load_weights(model: Encoder, path: Path) -> None:
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the weights {path}: {error}") from error
    if _OPEN_CLIP_SCALE in weights:
        weights[_OUR_SCALE] = weights.pop(_OPEN_CLIP_SCALE)
    expected = model.state_dict()
    shapes, expected_shapes = (
        {(name, tensor.shape) for name, tensor in each.items()} for each in (weights, expected)
    )
    wrong = sorted({name for name, _ in shapes ^ expected_shapes})
    if wrong:
        shown = ", ".join(wrong[:3]) + (", ..." if len(wrong) > 3 else "")
        raise CheckpointError(
            f"{path} does not fit its model: {len(wrong)} tensors are missing, unexpected or of "
            f"another shape ({shown})"
        )
    check_finite(weights, str(path))
    model.load_state_dict(weights)


def check_finite(weights: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights that are not finite: they give no features."""
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{where} has a NaN or an infinity in {name}; expected finite weights"
            )


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
