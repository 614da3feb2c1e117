"""Bundles in the formats of other projects, where those can express the model."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import open_clip
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import save_file

from vlm.bundle import Bundle, save_bundle
from vlm.checkpoints import chinese_clip, hugging_face, m2_encoder
from vlm.checkpoints.accounting import to_theirs
from vlm.checkpoints.fast_export import fast_files
from vlm.checkpoints.reading import Tensors
from vlm.errors import CheckpointError
from vlm.files import write_file, write_folder
from vlm.models.dual_encoder import DualEncoder
from vlm.models.multiway import MultiwayEncoder
from vlm.models.multiway_config import released_tensors
from vlm.text.sentencepiece_vocabulary import SentencePieceVocabulary
from vlm.text.tokenizer import Tokenizer

_TEXT_TOWER = "text_tower"  # the folder of a text tower's own configuration

Format = Literal["open_clip", "chinese-clip", "hf", "m2"]

_TRAINING = ("patch_dropout", "output_tokens")
_NAMES_AND_PADDING = (
    "hf_model_name", "hf_model_pretrained", "hf_tokenizer_name", "tokenizer_mode",
    "tokenizer_kwargs", "pad_id",
)  # fmt: skip
_IN_THE_TRANSFORMERS_CONFIG = (
    "context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "pool_type",
)  # fmt: skip
_BERT: Mapping[str, Any] = {
    "hidden_act": "gelu", "layer_norm_eps": 1e-12, "type_vocab_size": 2, "pad_token_id": 0,
    "position_embedding_type": "absolute", "is_decoder": False,
}  # fmt: skip
_BERT_SIZES = (
    "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "intermediate_size", "max_position_embeddings",
)  # fmt: skip


def export(bundle: Bundle, out: Path, target: Format) -> list[str]:
    """Write a bundle in another project's format; return sentences on what that has to do without.

    * `open_clip`: a folder for `local-dir:`;
    * `hf`: a folder of transformers' `CLIPModel` or `ChineseCLIPModel`;
    * `chinese-clip`: a file of `cn_clip`;
    * `m2`: M2-Encoder's file.

    Raises:
        CheckpointError: the format cannot express the model, its images or its tokenizer.
    """
    return _WRITERS[target](bundle, out)


def _to_open_clip(bundle: Bundle, out: Path) -> list[str]:
    _dual(bundle, "open_clip")
    cfg = dict(bundle.model_cfg)
    hf_config = cfg["text_cfg"].get("hf_config")
    if hf_config is not None:
        # open_clip looks the sizes up by a name; a folder's needs no network.
        cfg["text_cfg"] = {**cfg["text_cfg"], "hf_model_name": str((out / _TEXT_TOWER).resolve())}
    _check_open_clip(bundle, cfg)
    tokenizer, notes = _for_open_clip(bundle.tokenizer)
    save_bundle(
        out,
        model=bundle.model,
        model_cfg=cfg,
        preprocess_cfg=bundle.preprocess_cfg,
        tokenizer=tokenizer,
        languages=bundle.languages,
        first_new_id=bundle.first_new_id,
        truncate_dims=bundle.truncate_dims,
    )
    if hf_config is None:
        return notes
    write_file(out / _TEXT_TOWER / "config.json", json.dumps(dict(hf_config)).encode())
    return [*notes, "the description names the folder's place: convert again rather than move it"]


def _for_open_clip(tokenizer: Tokenizer) -> tuple[Tokenizer, list[str]]:
    """Add the files that open_clip's `get_tokenizer` needs, where there are some."""
    if tokenizer.fast_files or not isinstance(tokenizer.vocabulary, SentencePieceVocabulary):
        return tokenizer, []
    try:
        files = fast_files(tokenizer)
    except CheckpointError as error:
        return tokenizer, [f"open_clip's get_tokenizer cannot read the tokenizer: {error}"]
    return Tokenizer(tokenizer.vocabulary, tokenizer.config, fast_files=files), []


def _check_open_clip(bundle: Bundle, cfg: Mapping[str, Any]) -> None:
    """Refuse what open_clip would build otherwise; a tower of transformers it leaves to those."""
    hf_config = cfg["text_cfg"].get("hf_config")
    try:
        with torch.device("meta"), TemporaryDirectory() as folder:
            text = {name: value for name, value in cfg["text_cfg"].items() if name != "hf_config"}
            if hf_config is not None:
                (Path(folder) / "config.json").write_text(json.dumps(dict(hf_config)))
                text |= {"hf_model_name": folder, "hf_model_pretrained": False}
            vision = {**cfg["vision_cfg"], "timm_model_pretrained": False}
            theirs = open_clip.CustomTextCLIP(
                cfg["embed_dim"], vision, text, init_logit_bias=cfg.get("init_logit_bias")
            )
    except (TypeError, RuntimeError, AssertionError, ValueError, OSError) as error:
        raise CheckpointError(f"open_clip cannot build the model: {error}") from error
    expected = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    held = bundle.model.state_dict().items()
    found = {name.replace("log_logit_scale", "logit_scale"): tensor.shape for name, tensor in held}
    wrong = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
    if wrong:
        raise CheckpointError(
            f"open_clip builds another model of this description: {len(wrong)} tensors differ "
            f"({', '.join(wrong[:3])})"
        )


def _to_chinese_clip(bundle: Bundle, out: Path) -> list[str]:
    model = _dual(bundle, "Chinese-CLIP")
    kind = bundle.model_cfg["text_cfg"].get("hf_config", {}).get("model_type")
    if kind != "bert":
        found = kind or "a text transformer"
        raise CheckpointError(f"Chinese-CLIP has BERT's text tower; the bundle's is {found}")
    theirs = to_theirs(model.state_dict(), chinese_clip.origin_of)
    try:
        again = chinese_clip.chinese_clip_model_cfg(theirs)
    except CheckpointError as error:
        raise CheckpointError(f"Chinese-CLIP cannot express the model: {error}") from error
    _same(bundle, again, "Chinese-CLIP")
    _save_torch({f"module.{name}": tensor for name, tensor in theirs.items()}, out)
    return ["the file holds no tokenizer and no image transform; cn_clip has its own"]


def _to_hugging_face(bundle: Bundle, out: Path) -> list[str]:
    model = _dual(bundle, "transformers")
    record = hugging_face.model_config(bundle.model_cfg, bundle.tokenizer)
    _same(bundle, hugging_face.hugging_face_model_cfg(record, bundle.tokenizer), "transformers")
    preprocessor = hugging_face.preprocessor_config(bundle.preprocess_cfg, record["model_type"])
    files, notes = hugging_face.tokenizer_files(bundle.tokenizer)
    weights = to_theirs(model.state_dict(), hugging_face.origin_of)
    with write_folder(out) as temporary:
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        for name, content in (
            (hugging_face.CONFIG, record),
            (hugging_face.PREPROCESSOR, preprocessor),
        ):
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for name, data in files.items():
            (temporary / name).write_bytes(data)
    return notes


def _to_m2(bundle: Bundle, out: Path) -> list[str]:
    model = bundle.model
    if not isinstance(model, MultiwayEncoder):
        raise CheckpointError(
            "M2-Encoder's format holds multiway towers; the bundle is a dual encoder"
        )
    if model.logit_bias is not None:
        raise CheckpointError("M2-Encoder's format has no bias of a sigmoid loss")
    theirs = to_theirs(model.state_dict(), m2_encoder.origin_of)
    heads, width = model.config.heads, model.config.width
    published = m2_encoder.PUBLISHED_HEADS.get(width)
    if published not in (None, heads):
        raise CheckpointError(
            f"M2-Encoder's format cannot express {heads} attention heads of a width of {width}: "
            f"its published model of that width has {published}, and no tensor shows the number"
        )
    absent = sorted(
        released_tensors(model.config, model.token_embedding.num_embeddings).keys() - theirs.keys()
    )
    _save_torch(theirs, out)
    hint = [] if published else [f"no tensor shows the {heads} heads: read it with --heads {heads}"]
    return [
        *hint,
        f"left out {len(absent)} tensors that released checkpoints have and nothing reads: "
        f"{', '.join(absent)}",
        "the file holds no tokenizer and no image transform",
    ]


_WRITERS: Mapping[Format, Callable[[Bundle, Path], list[str]]] = {
    "open_clip": _to_open_clip,
    "chinese-clip": _to_chinese_clip,
    "hf": _to_hugging_face,
    "m2": _to_m2,
}


def _dual(bundle: Bundle, target: str) -> DualEncoder:
    if not isinstance(bundle.model, DualEncoder):
        raise CheckpointError(f"{target} cannot express multiway towers; expected --format m2")
    return bundle.model


def _same(bundle: Bundle, again: Mapping[str, Any], target: str) -> None:
    """Refuse a model that would be read back as another one."""
    ours, theirs = _flat(bundle.model_cfg), _flat(again)
    names = sorted(ours.keys() | theirs.keys())
    differing = [f"{n} {ours.get(n)}" for n in names if ours.get(n) != theirs.get(n)]
    if differing:
        raise CheckpointError(f"{target} cannot express the model's {', '.join(differing)}")


def _flat(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides features: not how a model is trained or where its names come from."""
    vision, text = asdict(CLIPVisionCfg(**cfg["vision_cfg"])), dict(cfg["text_cfg"])
    if not vision["timm_model_name"]:
        vision = {name: value for name, value in vision.items() if not name.startswith("timm_")}
    if isinstance(vision["layers"], list | tuple):
        vision["layers"] = list(vision["layers"])
        del vision["patch_size"], vision["mlp_ratio"]
    hf_config = text.pop("hf_config", None)
    text = asdict(CLIPTextCfg(**text))
    text["pool_type"] = "eos" if text["pool_type"] == "argmax" else text["pool_type"]
    bias = {"init_logit_bias": "there is one"} if cfg.get("init_logit_bias") is not None else {}
    flat = {"embed_dim": cfg["embed_dim"], "quick_gelu": bool(cfg.get("quick_gelu"))} | bias
    dropped = {*_TRAINING, *_NAMES_AND_PADDING, "eos_id"}
    if hf_config is not None:
        dropped |= set(_IN_THE_TRANSFORMERS_CONFIG)
        known = _BERT | hf_config
        flat |= {f"text_cfg.hf_config.{n}": known.get(n) for n in (*_BERT_SIZES, *_BERT)}
    for tower, part in (("vision_cfg", vision), ("text_cfg", text)):
        flat |= {f"{tower}.{n}": value for n, value in part.items() if n not in dropped}
    return flat


def _save_torch(tensors: Tensors, out: Path) -> None:
    if out.is_dir():
        raise CheckpointError(f"{out} is a folder; expected a file to write")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    try:
        torch.save({"state_dict": tensors}, partial)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
