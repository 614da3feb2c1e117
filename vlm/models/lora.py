"""Low-rank adapters on towers: small matrices are trained in the place of the towers' own."""

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import override

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
    attentions = [
        module
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight in locked
    ]
    within = {linear for attention in attentions for linear in attention.children()}
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight in locked and module not in within
    ]
    if not attentions and not linears:
        raise ConfigError("the towers have no linear layer or attention that adapters could go to")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if linears:
        settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=linears)
        inject_adapter_in_model(settings, model)
    # The library locks the whole model, and not the tower alone.
    for parameter in trained:
        parameter.requires_grad_(parameter not in locked)
    # The library's adapters of attention write to the locked matrices in each pass, which leaves
    # rounding errors there, and add B A to the last one twice.
    for attention in attentions:
        for layer, name in ((attention, "in_proj_weight"), (attention.out_proj, "weight")):
            adapter = _AddedProduct(getattr(layer, name), rank=rank, alpha=alpha)
            parametrize.register_parametrization(layer, name, adapter)


def without_lora(model: Model) -> Model:
    """Return a copy of a model in which adapters are multiplied out into the layers' matrices.

    A model that has none is returned as it is.
    """
    if not any(_is_linear_adapter(each) or _is_added_to(each) for each in model.modules()):
        return model
    model = deepcopy(model, memo=_communicators(model))
    for name, module in list(model.named_modules()):
        if _is_linear_adapter(module):
            model.set_submodule(name, _merged(module))
        elif _is_added_to(module):
            _multiply_out(module)
    return model


class _AddedProduct(nn.Module):
    """Turns a matrix W into `W + alpha / rank * B A`, where it lies."""

    def __init__(self, matrix: Tensor, *, rank: int, alpha: int) -> None:
        super().__init__()
        rows, columns = matrix.shape
        self.lora_A = nn.Parameter(matrix.new_empty(rank, columns))
        self.lora_B = nn.Parameter(matrix.new_zeros(rows, rank))
        self._scale = alpha / rank
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as a linear layer's weight

    @override
    def forward(self, matrix: Tensor) -> Tensor:
        return matrix + self._scale * (self.lora_B @ self.lora_A)


def _communicators(model: nn.Module) -> dict[int, Any]:
    """Return what batch norms over several ranks hold and no copy can have anew, by identity."""
    held = [value for module in model.modules() for value in vars(module).values()]
    held += [value.process_group for value in held if isinstance(value, RankGroup)]
    return {id(value): value for value in held if isinstance(value, dist.ProcessGroup)}


def _is_added_to(module: nn.Module) -> bool:
    added = getattr(module, "parametrizations", {}).values()
    return any(isinstance(each[0], _AddedProduct) for each in added)


def _multiply_out(module: Any) -> None:
    """Give a module of one matrix with an adapter the sum as its matrix."""
    (name,) = module.parametrizations
    matrix = getattr(module, name).detach()
    # torch's own way back changes the class, which a copy has in common with its model.
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    module.register_parameter(name, nn.Parameter(matrix, requires_grad=False))


def _is_linear_adapter(module: nn.Module) -> bool:
    return hasattr(module, "get_base_layer") and hasattr(module, "merge")


def _merged(module: Any) -> nn.Module:
    module.merge()
    layer = module.get_base_layer()
    assert isinstance(layer, nn.Module)
    return layer
