"""open_clip's adapter to text models of transformers: built without the network, and run."""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from open_clip.hf_configs import arch_dict
from open_clip.hf_model import HFTextEncoder
from torch import Tensor, nn

from vlm.errors import ConfigError
from vlm.models.encoder import Replacement
from vlm.text.tokenizer import TokenBatch

_POOLERS = ("mean_pooler", "cls_pooler", "cls_last_hidden_state_pooler")

# What says where a configuration came from, or would run code or change the weights' type.
_NOT_KEPT = ("_name_or_path", "transformers_version", "auto_map", "dtype", "torch_dtype")


def read_hf_config(name: str) -> dict[str, Any]:
    """Return the configuration of a text model, of a folder or cached from Hugging Face, as a dict.

    Raises:
        ConfigError: it is not on this machine, or transformers is not installed.
    """
    _require_transformers()
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the configuration of the text model {name!r} is not on this machine; expected it "
            f"in text_cfg's hf_config, or in the cache: `hf download {name} config.json`"
        ) from error
    return _plain(config.to_dict())


def write_hf_config(hf_config: Mapping[str, Any], folder: Path) -> None:
    """Write a configuration where open_clip's adapter can read it instead of downloading one."""
    _require_transformers()
    from transformers import CONFIG_MAPPING

    kind = hf_config.get("model_type")
    if kind not in arch_dict or kind not in CONFIG_MAPPING:
        raise ConfigError(
            f"hf_config describes a text model of type {kind!r}; "
            f"expected one of {', '.join(arch_dict)}"
        )
    text = json.dumps(_plain(hf_config))
    (folder / "config.json").write_text(text, encoding="utf-8")


def check(tower: HFTextEncoder) -> None:
    """Refuse a tower that open_clip builds and cannot run."""
    pooler = next((name for name in _POOLERS if _snake(tower.pooler) == name), None)
    if pooler is None:
        raise ConfigError(
            f"the text tower pools by {_snake(tower.pooler)!r}, which open_clip cannot run; "
            f"expected one of {', '.join(_POOLERS)}"
        )
    if not hasattr(tower, "proj"):
        raise ConfigError(
            f"the text model has states of another width than embed_dim, {tower.output_dim}; "
            "expected hf_proj_type linear or mlp"
        )


def run(
    tower: HFTextEncoder,
    tokens: TokenBatch,
    replaced: Replacement | None = None,
) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch length width"]]:
    """Return one feature a text, not normalised, and the last states of its tokens."""
    mask = tokens.mask.long()
    # Some models count positions by this id.
    ids = tokens.ids.masked_fill(~tokens.mask, tower.config.pad_token_id)
    if replaced is None:
        output = tower.transformer(input_ids=ids, attention_mask=mask)
    else:
        where, vector = replaced
        embeddings = token_embedding(tower)(ids)
        embeddings = torch.where(where[:, :, None], vector.to(embeddings.dtype), embeddings)
        output = tower.transformer(inputs_embeds=embeddings, attention_mask=mask)
    return tower.proj(tower.pooler(output, mask)), output.last_hidden_state


def token_embedding(tower: HFTextEncoder) -> nn.Embedding:
    """Return the rows of the vocabulary."""
    embedding: nn.Embedding = tower.transformer.get_input_embeddings()
    return embedding


def groups(tower: HFTextEncoder) -> list[list[nn.Parameter]]:
    """Return the parameters: embeddings, blocks, the last with what follows, the projection."""
    stack, repeated = _stack(tower)
    before: list[nn.Parameter] = []
    after: list[nn.Parameter] = []
    seen_blocks = False
    for name, parameter in tower.transformer.named_parameters():
        inside = name.startswith(f"{stack}.")
        seen_blocks |= inside
        if not inside:
            (after if seen_blocks else before).append(parameter)
    layers = [list(block.parameters()) for block in repeated]
    layers[-1] += after
    projection = list(tower.proj.parameters())
    return [before, *layers] + ([projection] if projection else [])


def blocks(tower: HFTextEncoder) -> list[nn.Module]:
    """Return the layers that the tower repeats."""
    return list(_stack(tower)[1])


def _stack(tower: HFTextEncoder) -> tuple[str, nn.ModuleList]:
    return next(
        (name, module)
        for name, module in tower.transformer.named_modules()
        if isinstance(module, nn.ModuleList)
    )


def _snake(module: nn.Module) -> str:
    name = type(module).__name__
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


def _plain(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in hf_config.items() if name not in _NOT_KEPT}


def _require_transformers() -> None:
    if find_spec("transformers") is None:
        raise ConfigError(
            "the text tower is a model of transformers, which is not installed; "
            "expected `pip install 'vlm[hf]'`"
        )
