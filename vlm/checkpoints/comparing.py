"""Whether two descriptions say the same model, and what differs: what a format cannot express."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from open_clip.model import CLIPTextCfg, CLIPVisionCfg

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


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return what differs between the models of two of open_clip's descriptions.

    Only what decides features counts, not how a model is trained or where its names come from.

    Returns:
        A phrase for each difference, such as `vision_cfg.pool_type avg`, with the value of `one`.
    """
    left, right = _flat(one), _flat(other)
    names = sorted(left.keys() | right.keys())
    return [f"{name} {left.get(name)}" for name in names if left.get(name) != right.get(name)]


def _flat(cfg: Mapping[str, Any]) -> dict[str, Any]:
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
