"""Every file in `configs/` says what it is for, loads, and builds."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from tests.builders import TINY_MODEL, make_samples, tiny_bundle, tiny_tokenizer, write_split
from tests.support.commands import run_vlm
from vlm.cli import eval_retrieval
from vlm.cli.options import sources_in
from vlm.cli.parsing import parse, part_of
from vlm.cli.train import Options
from vlm.models.build import build_from_config
from vlm.models.config import ModelConfig
from vlm.reports.table import published_benchmarks
from vlm.training.config import ClusterConfig, TrainConfig, config_as_yaml
from vlm.training.planning.dry_run import dry_run

ROOT = Path(__file__).parents[2]
ALL = sorted((ROOT / "configs").rglob("*.yaml"))
MODEL = sorted((ROOT / "configs/model").glob("*.yaml"))
EVALUATE = sorted((ROOT / "configs/evaluate").glob("*.yaml"))
TRAIN = sorted((ROOT / "configs/train").glob("*.yaml"))


def read(path):
    options = parse(Options, ["--config", str(path)], prog="vlm train", description="")
    return part_of(options, TrainConfig)


@pytest.fixture(autouse=True)
def the_checkout(monkeypatch):
    """Stand where the paths in the files start from."""
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_file_opens_with_a_comment(path):
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("path", TRAIN, ids=lambda path: path.name)
def test_training_files_give_their_command_and_result(path):
    text = path.read_text()
    assert "-m vlm train" in text
    assert "# Result: " in text


@pytest.mark.parametrize("path", TRAIN, ids=lambda path: path.name)
def test_training_files_build_their_model(path):
    config = read(path)
    with torch.device("meta"):
        model = build_from_config(config.model, tiny_tokenizer())
    assert sum(parameter.numel() for parameter in model.parameters()) > 100_000


@pytest.mark.parametrize("path", TRAIN, ids=lambda path: path.name)
def test_a_configuration_survives_being_written_and_read_again(path, tmp_path):
    config = read(path)
    written = tmp_path / "config.yaml"
    written.write_text(config_as_yaml(config))
    assert read(written) == config


@pytest.mark.parametrize("path", TRAIN, ids=lambda path: path.name)
def test_a_file_states_only_what_differs_from_the_defaults(path):
    defaults = yaml.safe_load(config_as_yaml(TrainConfig()))

    def repeated(stated, default, name=""):
        for key, value in stated.items():
            if isinstance(value, dict):
                yield from repeated(value, default[key], f"{name}{key}.")
            elif key != "model" and value == default.get(key):
                yield name + key

    assert not list(repeated(yaml.safe_load(path.read_text()), defaults))


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("siglip2-zh", replace(TINY_MODEL, init_logit_bias=-16.5)),
        ("clip-zh", TINY_MODEL),
        ("vit-b-16", None),
    ],
)
def test_a_recipe_would_get_through(name, start, tmp_path):
    """With a tiny model, data and batch in the place of its own."""
    write_split(tmp_path / "pairs", make_samples(80), samples_per_shard=40)
    write_split(tmp_path / "pairs", make_samples(10), split="val")
    config = read(ROOT / f"configs/train/{name}.yaml")
    sources = tuple(replace(each, path=str(tmp_path / "pairs")) for each in config.data.mixed)
    settings = replace(
        config,
        run_folder=tmp_path / "run",
        start_from=start and tiny_bundle(tmp_path / "start", config=start),
        data=replace(config.data, sources=sources, batch_size=40, workers=0),
        evaluation=replace(config.evaluation, folder=tmp_path / "pairs"),
    )
    plan = dry_run(settings, ClusterConfig(world=8))
    assert (plan.problems, plan.warnings) == ([], [])


@pytest.mark.parametrize("path", MODEL, ids=lambda path: path.name)
def test_model_files_build(path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ModelConfig, as_group=False)
    options = parser.instantiate(parser.parse_object(yaml.safe_load(path.read_text())))
    config = ModelConfig(**vars(options))
    with torch.device("meta"):
        model = build_from_config(config, tiny_tokenizer())
    assert sum(parameter.numel() for parameter in model.parameters()) > 100_000


def test_model_files_are_named_by_a_training_file():
    said = "".join(path.read_text() for path in TRAIN)
    assert [path.name for path in MODEL if path.name not in said] == []


@pytest.mark.parametrize("path", EVALUATE, ids=lambda path: path.name)
def test_evaluation_files_give_their_command_and_name_published_benchmarks(path):
    words = ["bundle", "--config", str(path)]
    options = parse(eval_retrieval.Options, words, prog="vlm eval retrieval", description="")
    named = sources_in(options, options.data)
    assert {source.name.lower() for source in named} <= published_benchmarks().keys()
    assert not any(source.file.is_absolute() for source in named)
    assert f"vlm eval retrieval runs/mine/bundle --config {path.relative_to(ROOT)} " in (
        " ".join(path.read_text().replace("#", " ").split())
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["m2-0.4b", "m2-1b", "m2-10b"])
def test_the_plan_at_the_head_of_a_file_is_what_its_command_prints(name):
    comments = (ROOT / f"configs/train/{name}.yaml").read_text().split("# Result: ")[0]
    (command,) = re.findall("^#   vlm (train --dry-run .*)$", comments, re.MULTILINE)
    plan = comments[comments.index("# parameters\n") :].rstrip("#\n")
    # There is no data, and the disk is this machine's, which may be too small.
    out, _ = run_vlm(*command.split(), code=2)
    printed = out[out.index("parameters\n") : out.index("\ndisk\n")]
    assert plan == "".join(f"# {line}\n" for line in printed.splitlines()).rstrip("\n")
