"""The options of every verb are pinned: adding one is a decision, not an accident."""

from dataclasses import fields
from importlib import import_module

import pytest

from vlm.cli.main import VERBS, main

TRAIN = {"config", "run_folder", "seed", "precision", "cpu_threads", "parallel_towers"} | {
    "start_from", "tokenizer", "compile",
    "report_every", "trackers", "deterministic", "profile",
    "data", "captions", "preprocess", "augmentation", "model", "loss",
    "objectives", "adapt", "optimizer", "schedule", "stages", "averaging", "guard", "evaluation",
    "checkpoint",
}  # fmt: skip
FIELDS = {"captions", "language_of", "image", "concept"}
SOURCES = FIELDS | {
    "data", "split", "language", "languages", "where", "images", "duplicates", "lower_case",
    "allowed_share",
}  # fmt: skip
SOURCE = FIELDS | {"path", "config", "split", "images", "where"}
INDEXES = {"index", "target_recall", "memory", "sweep"}
EMBEDDER = {"device", "truncate_dim"}
TEXTS = {"zh", "en", "column", "split"}
GROWTH = {"init", "lexicon", "vectors", "neighbours", "temperature", "rank", "positions", "how"} | {
    "seed"
}
AROUND_PIECES = {"context_length", "begin_of_text", "end_of_text", "padding", "truncation"} | {
    "cleaning"
}
PINNED = {
    "quickstart": TRAIN | {"out"},
    "train": TRAIN
    | {"resume", "dry_run", "json", "world", "ranks_per_node", "sharding", "mfu", "peak_tflops"},
    "plot": {"runs", "by", "out"},
    "eval retrieval": SOURCES
    | INDEXES
    | EMBEDDER
    | {"bundle", "config", "json", "out", "cache", "pixels", "questions", "part"},
    "eval classification": {"data", "split", "label", "where", "images", "classes", "templates"}
    | EMBEDDER
    | {"bundle", "languages", "json", "out", "cache"},
    "eval table": {"runs", "published", "mixed", "json"},
    "eval calibrate": SOURCES
    | {"prior", "precision", "most_wrong", "seed"}
    | EMBEDDER
    | {"bundle", "json"},
    "eval index": INDEXES | {"embeddings", "device", "json", "out"},
    "embed": FIELDS
    | {"bundle", "images", "data", "split", "where", "out", "allowed_share"}
    | EMBEDDER,
    "index": {"embeddings", "out", "factory"},
    "search": {"index", "text", "image", "k", "bundle", "device", "json"},
    "tokenizer report": TEXTS | {"folders", "limit", "json", "plot"},
    "tokenizer import": AROUND_PIECES | {"source", "out"},
    "tokenizer extend": TEXTS
    | {"base", "zh_lists", "traditional", "vocab_size", "coverage", "context_length", "out"},
    "tokenizer train": TEXTS
    | {"zh_lists", "en_lists", "traditional", "unique", "out"}
    | {"vocab_size", "context_length", "model_type", "temperature", "separate_spaces"}
    | {"han_coverage", "latin_coverage", "other_coverage"},
    "tokenizer export": {"folder"},
    "tokenizer prune": TEXTS | {"source", "fewest_uses", "out"},
    "convert": GROWTH
    | {"source", "to", "format", "extend", "model", "tokenizer", "preprocess", "hf_config"}
    | {"image_size", "heads", "context_length", "languages"},
    "grow": GROWTH | {"bundle", "tokenizer", "out"},
    "data show": SOURCE,
    "data index": SOURCE | {"out"},
    "data check": SOURCE,
}


def test_verbs_and_their_options_are_pinned():
    modules = {" ".join(verb): import_module(module) for verb, (module, _) in VERBS.items()}
    assert all(module.__doc__ for module in modules.values())
    found = {
        verb: {field.name for field in fields(module.Options)} for verb, module in modules.items()
    }
    assert found == PINNED


def test_help_says_what_a_setting_means(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "Ranks that contrast with each other, a divisor of their number; null is all: exact" in said
    )
    assert (
        "Seed of the initial weights, the order of samples, the choice of captions, augmentation."
        in said
    )
