"""What a run reads: its sources in their order, and the loader of their batches."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial

import numpy as np
from accelerate import Accelerator

from vlm.batches.examples import TrainingExamples
from vlm.batches.loader import TrainingLoader
from vlm.batches.mixture import BatchOrder, Mixture, batch_at, mixture_of
from vlm.batches.order import SourceOrder
from vlm.bundle import Bundle
from vlm.data.sample import described
from vlm.data.source import Source, open_source
from vlm.distributed.mesh import ranks_per_node
from vlm.errors import ConfigError
from vlm.images.config import PreprocessConfig
from vlm.images.transforms import TrainingTransform
from vlm.training.config import TrainConfig
from vlm.training.objectives import mask_plan

_LOOKED_AT = 100  # shards, for their languages: a start reads little, whatever the size of the data


def build_loader(config: TrainConfig, start: Bundle, accelerator: Accelerator) -> TrainingLoader:
    """Open the sources of a run; return the loader of this rank's batches from any of its steps."""
    ranks, sources = accelerator.num_processes, open_sources(config)
    streams = config.data.streams or ranks // ranks_per_node()
    order = BatchOrder(
        source_orders(config, sources, streams),
        mixture(config, sources),
        config.data.batch_size,
        seed=config.seed,
        rank=accelerator.process_index,
        world_size=ranks,
        changes=batch_sizes(config),
    )
    return TrainingLoader(
        # Each rank reads that many streams.
        examples_of(config, start, sources, order.sources, streams_read=-(-streams // ranks)),
        order,
        start.tokenizer,
        workers=config.data.workers,
        stall_s=config.data.stall_s,
        masks=mask_plan(config.objectives.masked, start.model),
        image_sizes=_changes(
            config, [stage.image_size for stage in config.whole_stages], _side(start)
        ),
    )


def open_sources(config: TrainConfig) -> dict[str, Source]:
    """Open the sources of a run by name; one has captions in each of its languages."""
    data = config.data
    sources = {
        name: open_source(each, verify=data.verify, cache_gib=data.cache_gib)
        for name, each in data.by_name.items()
    }
    check_languages(config, sources)
    return sources


def mixture(config: TrainConfig, sources: Mapping[str, Source]) -> Mixture:
    """Return the weights of the sources, in each stage."""
    return mixture_of(
        config.data,
        {name: len(source) for name, source in sources.items()},
        [(stage.end, stage.weights) for stage in config.whole_stages],
    )


def batch_sizes(config: TrainConfig) -> list[tuple[int, int]]:
    """Return from which batches on the stages have another number of samples, and that number.

    Raises:
        ConfigError: batches are of one label, by which an order is made for one size alone.
    """
    given = [stage.batch_size for stage in config.whole_stages]
    by = config.data.mixture.batch_by
    if by not in ("", "source") and any(given):
        raise ConfigError(
            f"a stage has a batch_size, and batches are of one {by}; expected data.batch_size alone"
        )
    return _changes(config, given, config.data.batch_size)


def _changes(
    config: TrainConfig, given: Sequence[int | None], default: int
) -> list[tuple[int, int]]:
    """Return from which batches on what the stages give holds; nothing if they give none."""
    firsts = [batch_at(each.first, config.data.skip_batches) for each in config.whole_stages]
    values = [value or default for value in given]
    return list(zip(firsts, values, strict=True)) if any(given) else []


def source_orders(
    config: TrainConfig, sources: Mapping[str, Source], streams: int
) -> list[SourceOrder]:
    """Return the order in which streams read each source: of a new run as many as its nodes."""
    data = config.data
    label = data.mixture.batch_by if data.mixture.batch_by != "source" else ""
    if label:
        _check_label(list(sources.values()), label)
    return [
        SourceOrder(
            name,
            np.array(source.sizes),
            streams,
            config.seed,
            groups=partial(source.label_ids, label) if label else None,
            run=max(data.batch_size // streams, 1),
        )
        for name, source in sources.items()
    ]


def examples_of(
    config: TrainConfig,
    start: Bundle,
    sources: Mapping[str, Source],
    orders: Sequence[SourceOrder],
    *,
    streams_read: int = 1,
) -> TrainingExamples:
    """Return what reads and augments the samples of sources."""
    return TrainingExamples(
        [
            source.keeping_open(streams_read * each.open_shards)
            for source, each in zip(sources.values(), orders, strict=True)
        ],
        orders,
        _training_transform(config, start),
        config.captions,
        seed=config.seed,
        keep_decoded=config.data.keep_decoded,
        languages=[config.data.by_name[name].languages for name in sources],
    )


def describe_sources(loader: TrainingLoader, batch: int) -> str:
    """Say how much each source has, and its share of a batch where there are several."""
    examples, order = loader.examples, loader.order
    found = [f"{source.name}: {described(source.sizes)}" for source in examples.sources]
    if len(found) > 1:
        shares = order.mixture.shares(batch)
        found = [f"{each} ({share:.1%})" for each, share in zip(found, shares, strict=True)]
    return "; ".join(found)


def _training_transform(config: TrainConfig, start: Bundle) -> TrainingTransform:
    """Return the augmentation of a run around the image transform of what it starts from."""
    known = {field.name for field in fields(PreprocessConfig)}
    settings = {name: value for name, value in start.preprocess_cfg.items() if name in known}
    settings |= {name: tuple(settings[name]) for name in ("mean", "std")}
    return TrainingTransform(PreprocessConfig(**settings), config.augmentation, _side(start))


def _side(start: Bundle) -> int:
    """Return the size of the model's images."""
    size = start.preprocess_cfg["size"]
    return int(size if isinstance(size, int) else size[0])


def check_languages(config: TrainConfig, sources: Mapping[str, Source]) -> None:
    """Refuse languages that no sample has: their terms of the loss would be 0 all the way."""
    languages, read = config.captions.languages, {}
    for name, source in sources.items():
        read[source] = set(config.data.by_name[name].languages)
        if unknown := read[source].difference(languages):
            raise ConfigError(
                f"the captions of {source.name} are read in {', '.join(sorted(unknown))}, which "
                f"captions.languages {', '.join(languages)} lacks; expected some of these"
            )
    found: set[str] = set()
    shards = [(source, shard) for source in read for shard in range(len(source.sizes))]
    for source, shard in shards[:_LOOKED_AT]:
        for row in source.rows(shard, ["languages"]):
            there = set(filter(None, row["languages"].split("+")))
            found |= there.intersection(read[source] or there)
        if found.issuperset(languages):
            return
    if len(shards) > _LOOKED_AT:
        return
    missing = [language for language in languages if language not in found]
    raise ConfigError(
        f"captions.languages has {', '.join(missing)}, but "
        f"{' and '.join(source.name for source in read)} have captions in "
        f"{', '.join(sorted(found)) or 'no language'} only; expected some of these"
    )


def _check_label(sources: Sequence[Source], label: str) -> None:
    """Refuse to batch by a label that no sample has."""
    shards = [(source, shard) for source in sources for shard in range(len(source.sizes))]
    for source, shard in shards[:_LOOKED_AT]:
        if any(label in dict(row["labels"] or ()) for row in source.rows(shard, ["labels"])):
            return
    if len(shards) <= _LOOKED_AT:
        raise ConfigError(
            f"data.mixture.batch_by is {label!r}, a label that no sample has; expected `source` or "
            "a label"
        )
