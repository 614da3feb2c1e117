"""open_clip and timm, imported without seconds of what only few models need of others.

open_clip imports transformers for its text towers, and torchvision and timm import torch's compiler
for two functions: half the time of a first search. While open_clip and timm are imported, stand-ins
take the place of those modules. What was taken from one imports the real module when it is used,
and so works as ever, also for a program that uses open_clip next to `vlm`.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_TAKEN = {
    "torch._dynamo": (),
    "torch._dynamo.utils": ("is_compile_supported",),
    "transformers": ("AutoConfig", "AutoModel", "AutoTokenizer", "PretrainedConfig"),
    "transformers.modeling_outputs": (
        "BaseModelOutput",
        "BaseModelOutputWithPooling",
        "BaseModelOutputWithPoolingAndCrossAttentions",
    ),
}


class _Later:
    """A function or class that is imported when it is used."""

    def __init__(self, module: str, name: str) -> None:
        self._real: Callable[[], Any] = lambda: getattr(import_module(module), name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._real()(*args, **kwargs)

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, self._real())


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        # CoCa's decoder, which is not used here, asks transformers for more, and does without.
        if name.startswith("__") or self.__name__.startswith("transformers"):
            raise AttributeError(name)
        # Another version of torch may need more of its compiler: then it is imported after all.
        del sys.modules[self.__name__]
        return getattr(import_module(self.__name__), name)


def _disable(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """Keep a function uncompiled as `torch._dynamo.disable` does, which is imported at a call."""

    @wraps(function)
    def uncompiled(*inputs: Any, **options: Any) -> Any:
        disable = import_module("torch._dynamo").disable
        return disable(function, *args, **kwargs)(*inputs, **options)

    vars(uncompiled)["_torchdynamo_disable"] = True  # what the compiler asks
    return uncompiled


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Replace the modules that are installed and not imported yet, while others are imported."""
    placed = {}
    for module, names in _TAKEN.items():
        package = module.split(".")[0]
        if module not in sys.modules and (package in placed or find_spec(package)):
            placed[module] = sys.modules[module] = _StandIn(module)
            vars(placed[module]).update({name: _Later(module, name) for name in names})
    if "torch._dynamo" in placed:
        vars(placed["torch._dynamo"])["disable"] = _disable
    try:
        yield
    finally:
        for module, stand_in in placed.items():
            if sys.modules.get(module) is stand_in:
                del sys.modules[module]


with _stand_ins():
    import open_clip  # noqa: F401
    import timm  # noqa: F401
