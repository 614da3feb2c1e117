"""How a network's blocks are run: computed again in the backward pass, or compiled."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from vlm.models.batch_norm import has_statistics, kept_statistics

_Context: TypeAlias = AbstractContextManager[Any]

_aten = torch.ops.aten
_PRODUCTS = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten.convolution.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
]

# A block is compiled for each kind of pass: its branch, one position or all, with or without
# gradients and dropout, and first for the sizes that come first. torch's own limit, 8, is for one.
_VARIANTS = 64


def recompute(blocks: Sequence[nn.Module], *, keep_products: bool = False) -> None:
    """Let blocks keep little for their backward pass and compute it again there, in place.

    Gradients stay the same, also with dropout. A block keeps its inputs alone (Chen et al. 2016,
    "Training deep nets with sublinear memory cost"), or the outputs of its matrix products, its
    convolutions and its attention as well, which take most of its time.
    """
    for block in blocks:
        kind = _RecomputedOnce if has_statistics(block) else _Recomputed
        block.forward = kind(block, keep_products)


def compile_blocks(
    blocks: Sequence[nn.Module], *, backend: str | Callable[..., Any] = "inductor"
) -> None:
    """Have blocks compiled when they are first called, in place; weights keep their names.

    Blocks of one kind share what is compiled. Batches and texts may have any length: at the second
    one, a block is compiled for all. Blocks with batch norms that are computed again stay as they
    are.
    """
    for block in blocks:
        block.compile(backend=backend, recompile_limit=_VARIANTS)


@dataclass(frozen=True, eq=False)
class _Recomputed:
    """Takes the place of `block.forward`; a copy of the block gets one of its own."""

    block: nn.Module
    keep_products: bool

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        forward = partial(type(self.block).forward, self.block)
        if not torch.is_grad_enabled():
            return forward(*inputs, **options)
        if self.keep_products:  # torch's compiler takes a plain function here, or nothing
            options["context_fn"] = _keep_products
        return checkpoint(forward, *inputs, use_reentrant=False, **options)


@dataclass(frozen=True, eq=False)
class _RecomputedOnce(_Recomputed):
    """The same for a block with batch norms, which count a batch in the first pass alone."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *inputs: Any, **options: Any) -> Any:
        forward = partial(type(self.block).forward, self.block)
        if not torch.is_grad_enabled():
            return forward(*inputs, **options)
        return checkpoint(
            forward, *inputs, use_reentrant=False, context_fn=self._contexts, **options
        )

    def _contexts(self) -> tuple[_Context, _Context]:
        @contextmanager
        def again(kept: _Context) -> Iterator[None]:
            with kept, kept_statistics(self.block):
                yield

        first, kept = _keep_products() if self.keep_products else (nullcontext(), nullcontext())
        return first, again(kept)


def _keep_products() -> tuple[_Context, _Context]:
    contexts: tuple[_Context, _Context] = create_selective_checkpoint_contexts(_PRODUCTS)
    return contexts
