"""The retrieval scores of a run while it trains."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from vlm.bundle import Bundle
from vlm.data.config import SourceConfig
from vlm.data.layout import has_manifest, splits_of
from vlm.distributed.groups import world_group
from vlm.distributed.sharding import ShardedModel
from vlm.embedding.embedder import Embedder, RuntimeEncoder
from vlm.errors import ConfigError
from vlm.evaluation.retrieval.evaluation import evaluate_retrieval
from vlm.evaluation.retrieval.pairs import pairs_of_split
from vlm.storage.places import shown
from vlm.training.config import EvaluationConfig, TrainConfig
from vlm.training.precision import Precision


def build_evaluation(
    config: TrainConfig, start: Bundle
) -> Callable[[RuntimeEncoder], dict[str, float]] | None:
    """Return a function that every rank calls, since the ranks share the work; None for none."""
    plan = config.evaluation
    if plan.every_steps == 0 or (plan.folder is None and not _has_split_to_score(config)):
        return None
    # Read before the first step, so that a missing split does not end a run half way.
    split, asked = (
        plan.split,
        SourceConfig(path=str(plan.folder or config.data.folder), split=plan.split),
    )
    languages = plan.languages or dict.fromkeys((*config.captions.languages, *start.languages))
    pairs = pairs_of_split(asked, languages=tuple(languages), cache_gib=config.data.cache_gib)
    if missing := [language for language in plan.languages if language not in pairs.texts]:
        raise ConfigError(
            f"evaluation.languages has {', '.join(missing)}, but {split} of {asked.path} has "
            f"captions in {', '.join(pairs.texts)}; expected some of these"
        )

    def evaluate(encoder: RuntimeEncoder) -> dict[str, float]:
        embedder = Embedder(start, model=encoder)
        scores = evaluate_retrieval(embedder, pairs, group=world_group())
        return {f"{split}/{name}": value for name, value in scores.items()}

    return evaluate


def describe_evaluation(config: TrainConfig, *, is_scored: bool) -> str:
    """Say what is scored while a run trains, or why nothing is."""
    plan = config.evaluation
    if is_scored:
        folder = shown(str(plan.folder or config.data.folder))
        return f"the split {plan.split!r} of {folder}, every {plan.every_steps:,} steps"
    if plan.every_steps:
        return f"nothing, as the data has no split {plan.split!r}; evaluation.folder names one"
    return "nothing, as evaluation.every_steps is 0"


def _has_split_to_score(config: TrainConfig) -> bool:
    """Say whether the run's own data can be scored; a split that was asked for must be there."""
    data, split = config.data, config.evaluation.split
    own = SourceConfig(path=str(data.folder))
    is_folder = not data.sources and has_manifest(own.path)
    return is_folder and (split != EvaluationConfig().split or split in splits_of(own))


@contextmanager
def ready_to_score(sharded: ShardedModel | None, precision: Precision) -> Iterator[None]:
    """Have all weights on every rank within a `with` block, and the arithmetic of training.

    Ranks share the work unevenly, so that no part of it may be a collective operation.
    """
    with nullcontext() if sharded is None else sharded.gathered(), precision.autocast():
        yield
