"""The options of every verb are pinned: adding one is a decision, not an accident."""

from importlib import import_module

import pytest
from jsonargparse import ArgumentParser

from vlm.cli.main import VERBS, main
from vlm.training.config import TrainConfig

TRAIN = {*TrainConfig.__dataclass_fields__, "config", "print_config"}
PINNED = {
    "quickstart": TRAIN | {"out"},
    "train": TRAIN | {"resume"},
    "eval retrieval": {"data", "split", "languages", "where", "device", "json", "out"},
    "embed": {"images", "data", "split", "out", "device"},
    "index": {"out"},
    "search": {"text", "image", "k", "bundle", "device", "json"},
    "tokenizer train": {"data", "split", "languages", "vocab_size", "context_length", "out"},
    "data emoji": {"out", "cache"},
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
        "augmentation", "captions", "checkpoint", "cpu_threads", "data", "evaluation",
        "loss", "model", "optimizer", "precision", "preprocess", "report_every", "run_folder",
        "schedule", "seed",
        "tokenizer",
    ]  # fmt: skip


def test_help_says_what_a_setting_means(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "Ranks that contrast with each other; it divides their number." in said
    assert "Decides the first weights, the order of samples, captions and augmentation." in said
