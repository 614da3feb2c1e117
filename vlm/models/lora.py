"""Low-rank adapters on towers: small matrices are trained in the place of the towers' own."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn

from vlm.distributed.groups import RankGroup
from vlm.errors import ConfigError

Model = TypeVar("Model", bound=nn.Module)


def add_lora(
    model: nn.Module, groups: Sequence[Sequence[nn.Parameter]], *, rank: int, alpha: int
) -> None:
    """Lock towers and add adapters to their linear layers and attention, in place, once.

    A layer's matrix W acts as `W + alpha / rank * B A` from here on, where only B, which is zero
    at first, and A of so low a rank are trained (LoRA, Hu et al. 2022, section 4.1); rank and alpha
    are at least 1. All parameters but the towers' groups stay as trainable as they are.

    Raises:
        ConfigError: the rank or scale is out of range, no tower has such a layer, or the
            package `peft` is not installed.
    """
    if min(rank, alpha) < 1:
        raise ConfigError(f"the adapters' rank is {rank} and alpha {alpha}; expected both above 0")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(
            "adapters need the package peft; expected `pip install 'vlm[lora]'`"
        ) from error
    locked = {parameter for group in groups for parameter in group}
    names = _adaptable(model, locked)
    if not names:
        raise ConfigError("the towers have no linear layer or attention that adapters could go to")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names)
    inject_adapter_in_model(settings, model)
    # The library locks the whole model, and not the tower alone.
    for parameter in trained:
        parameter.requires_grad_(parameter not in locked)


def without_lora(model: Model) -> Model:
    """Return a copy of a model in which adapters are multiplied out into the layers' matrices.

    A model that has none is returned as it is.
    """
    if not any(_is_adapter(module) for module in model.modules()):
        return model
    model = deepcopy(model, memo=_communicators(model))
    done: list[str] = []
    for name, module in list(model.named_modules()):
        # Attention merges the adapter of its output by itself.
        if _is_adapter(module) and not any(name.startswith(f"{outer}.") for outer in done):
            model.set_submodule(name, _merged(module))
            done.append(name)
    return model


def _adaptable(model: nn.Module, parameters: set[nn.Parameter]) -> list[str]:
    """Name the layers whose weights are among the parameters, attention as a whole."""
    names: list[str] = []
    for name, module in model.named_modules():
        within = any(name.startswith(f"{outer}.") for outer in names)
        if isinstance(module, nn.Linear | nn.MultiheadAttention) and not within:
            weight = module.weight if isinstance(module, nn.Linear) else module.in_proj_weight
            if weight in parameters:
                names.append(name)
    return names


def _communicators(model: nn.Module) -> dict[int, Any]:
    """Return what batch norms over several ranks hold and no copy can have anew, by identity."""
    held = [value for module in model.modules() for value in vars(module).values()]
    held += [value.process_group for value in held if isinstance(value, RankGroup)]
    return {id(value): value for value in held if isinstance(value, dist.ProcessGroup)}


def _is_adapter(module: nn.Module) -> bool:
    return hasattr(module, "get_base_layer") and hasattr(module, "merge")


def _merged(module: Any) -> nn.Module:
    if hasattr(module, "unload_and_optionally_merge_module"):  # attention, in several matrices
        layer = module.unload_and_optionally_merge_module(
            merge=True, safe_merge=False, adapter_names=None
        )
    else:
        module.merge()
        layer = module.get_base_layer()
    assert isinstance(layer, nn.Module)
    return layer
