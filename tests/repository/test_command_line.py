"""The options of every verb are pinned: adding one is a decision, not an accident."""

from importlib import import_module

import pytest
from jsonargparse import ArgumentParser

from vlm.checkpoints.config import ConversionConfig
from vlm.cli.main import VERBS, main
from vlm.evaluation.config import CalibrationPlan
from vlm.models.config import GrowthConfig
from vlm.text.config import SentencePieceConfig, TokenizerConfig
from vlm.training.config import TrainConfig

SOURCES = {"data", "split", "language", "languages", "where", "images"} | {
    "duplicates", "lower_case", "allowed_share",
}  # fmt: skip
INDEXES = {"index", "target_recall", "memory", "sweep"}
TRAIN = {*TrainConfig.__dataclass_fields__, "config", "print_config"}
TEXTS = {"zh", "en", "column", "split"}
PINNED = {
    "quickstart": TRAIN | {"out"},
    "train": TRAIN | {"resume"},
    "eval retrieval": SOURCES
    | INDEXES
    | {"config", "print_config", "device", "truncate_dim", "json", "out", "cache"},
    "eval classification": {"data", "split", "label", "where", "images", "classes", "templates"}
    | {"languages", "device", "truncate_dim", "json", "out", "cache"},
    "eval table": {"published", "mixed", "json"},
    "eval calibrate": SOURCES
    | {*CalibrationPlan.__dataclass_fields__, "device", "truncate_dim", "json"},
    "eval index": INDEXES | {"device", "json", "out"},
    "embed": {"images", "data", "split", "out", "device", "truncate_dim"},
    "index": {"out"},
    "search": {"text", "image", "k", "bundle", "device", "json"},
    "tokenizer report": TEXTS | {"limit", "json", "plot"},
    "tokenizer import": {*TokenizerConfig.__dataclass_fields__, "out"},
    "tokenizer extend": TEXTS
    | {"zh_lists", "traditional", "vocab_size", "coverage", "context_length", "out"},
    "tokenizer train": TEXTS
    | {*SentencePieceConfig.__dataclass_fields__}
    | {"zh_lists", "en_lists", "traditional", "unique", "out"},
    "tokenizer export": set(),
    "tokenizer prune": TEXTS | {"fewest_uses", "out"},
    "convert": {*ConversionConfig.__dataclass_fields__, *GrowthConfig.__dataclass_fields__}
    | {"to", "format", "extend"},
    "grow": {*GrowthConfig.__dataclass_fields__, "tokenizer", "out"},
    "data index": set(),
    "data check": set(),
}


def options_of(module_name):
    parser = ArgumentParser(exit_on_error=False)
    module = import_module(module_name)
    assert module.__doc__
    module.add_arguments(parser)
    names = {
        option.removeprefix("--").split(".")[0]
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--")
    }
    return {name.rstrip("+") for name in names} - {"help"}


def test_verbs_and_their_options_are_pinned():
    found = {" ".join(verb): options_of(module) for verb, (module, _) in VERBS.items()}
    assert found == PINNED


def test_training_fields_are_pinned():
    assert sorted(TrainConfig.__dataclass_fields__) == [
        "adapt", "augmentation", "captions", "checkpoint", "cpu_threads", "data", "evaluation",
        "loss", "model", "objectives", "optimizer", "precision", "preprocess", "report_every",
        "run_folder", "schedule", "seed", "start_from", "tokenizer",
    ]  # fmt: skip


def test_help_says_what_a_setting_means(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "Ranks that contrast with each other; it divides their number." in said
    assert "Decides the first weights, the order of samples, captions and augmentation." in said


def test_the_settings_of_tokenizers_and_growth_are_pinned():
    assert sorted(TokenizerConfig.__dataclass_fields__) == [
        "begin_of_text", "cleaning", "context_length", "end_of_text", "padding", "truncation",
    ]  # fmt: skip
    assert sorted(SentencePieceConfig.__dataclass_fields__) == [
        "context_length", "han_coverage", "latin_coverage", "model_type", "other_coverage",
        "separate_spaces", "temperature", "vocab_size",
    ]  # fmt: skip
    assert sorted(GrowthConfig.__dataclass_fields__) == [
        "how", "init", "lexicon", "neighbours", "positions", "rank", "seed", "temperature",
        "vectors",
    ]  # fmt: skip
