"""Texts are encoded, and differentiated, in a thread of their own while images are."""

from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from vlm.errors import ConfigError
from vlm.models.encoder import Encoder

_T = TypeVar("_T")
ByName = Mapping[str, Mapping[str, Tensor]]
"""Features by the name of their texts and by head."""


class TextThread:
    """Runs the text tower's passes next to the image tower's.

    A small model leaves a second core idle: threads inside its operators wait for each other
    hundreds of times a step, and for as long as others keep them from a core. Towers meet twice.

    Raises:
        ConfigError: the towers share parameters, whose gradients would be summed in any order.
    """

    def __init__(self, encoder: Encoder) -> None:
        images, texts = (
            {id(parameter) for group in groups for parameter in group}
            for groups in (encoder.image_groups(), encoder.text_groups())
        )
        if images & texts:
            raise ConfigError(
                f"parallel_towers is true, but the towers of a {type(encoder).__name__} share "
                "layers; expected false"
            )
        # It begins with the number of cores, not with what this thread was limited to.
        self._thread = ThreadPoolExecutor(
            1, "texts", torch.set_num_threads, (torch.get_num_threads(),)
        )

    def run(self, texts: Callable[[], ByName], images: Callable[[], _T]) -> tuple[ByName, _T]:
        """Call both at once; a backward pass through what they return does the same.

        Raises:
            ConfigError: random numbers were drawn, which tower had which is a matter of chance.
        """
        before = torch.get_rng_state()
        with_graph, rounds = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu")

        def in_thread() -> ByName:
            # What a `with` has set is set for its own thread alone.
            with torch.set_grad_enabled(with_graph), torch.autocast("cpu", dtype, enabled=rounds):
                return texts()

        waiting = self._thread.submit(in_thread)
        image = images()
        text = waiting.result()
        if not torch.equal(before, torch.get_rng_state()):
            raise ConfigError(
                "parallel_towers is true, but the towers draw random numbers, for dropout or the "
                "like, which would depend on the machine's load; expected false"
            )
        return self._joined(text), image

    def _joined(self, text: ByName) -> ByName:
        """Return the features such that their gradients go on in the thread.

        The backward pass takes up first what was created last: this, and not the image tower.
        """
        flat = {(name, head): each for name, of in text.items() for head, each in of.items()}
        if not any(each.requires_grad for each in flat.values()):
            return text
        leaves = [each.detach().requires_grad_() for each in flat.values()]
        outputs = iter(_InThread.apply(self._thread, list(flat.values()), *leaves))
        return {name: {head: next(outputs) for head in of} for name, of in text.items()}


class _InThread(torch.autograd.Function):
    """Hands gradients over to a thread, which the backward pass waits for at its end."""

    @staticmethod
    def forward(ctx: Any, thread: Executor, roots: list[Tensor], *leaves: Tensor) -> Any:
        ctx.thread, ctx.roots = thread, roots
        return tuple(leaf.view_as(leaf) for leaf in leaves)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        waiting = ctx.thread.submit(torch.autograd.backward, ctx.roots, gradients)
        torch.autograd.Variable._execution_engine.queue_callback(waiting.result)
        return (None, None, *[None] * len(gradients))
