"""Bilingual (Chinese-English) vision-language pretraining, retrieval and embeddings.

The names below are imported when they are first used, so that `import vlm` costs no torch import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm.embedding.embedder import Embedder
    from vlm.errors import VlmError
    from vlm.evaluation.retrieval.evaluation import evaluate_retrieval
    from vlm.evaluation.retrieval.run import evaluate
    from vlm.text.tokenizer import Tokenizer, load_tokenizer

    load = Embedder.load

__version__ = "0.1.0"

__all__ = [
    "Embedder",
    "Tokenizer",
    "VlmError",
    "__version__",
    "evaluate",
    "evaluate_retrieval",
    "load",
    "load_tokenizer",
]

_HOMES = {
    "Embedder": "vlm.embedding.embedder",
    "Tokenizer": "vlm.text.tokenizer",
    "VlmError": "vlm.errors",
    "evaluate": "vlm.evaluation.retrieval.run",
    "evaluate_retrieval": "vlm.evaluation.retrieval.evaluation",
    "load_tokenizer": "vlm.text.tokenizer",
}


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it."""
    if name == "load":
        return __getattr__("Embedder").load
    if name not in _HOMES:
        raise AttributeError(f"module 'vlm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
