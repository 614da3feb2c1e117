"""The command line answers a user's mistake with one line, a code of 2 and no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import vlm
from tests.builders import make_samples, write_split
from vlm.cli.main import VERBS, main
from vlm.errors import VlmError


@pytest.fixture(autouse=True)
def an_empty_folder(tmp_path, monkeypatch):
    """Run every test where no configuration, data or tokenizer of the project lies."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def complaint(capsys, *words):
    """Return the one line that the command says before it fails."""
    code = main(list(words))
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.startswith("vlm: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err.removeprefix("vlm: ").removesuffix("\n")


def run_module(*words):
    environment = os.environ | {"PYTHONWARNINGS": "default"}
    return subprocess.run(
        [sys.executable, "-m", "vlm", *words], capture_output=True, text=True, env=environment,
        check=False,
    )  # fmt: skip


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]], ids=" ".join)
def test_help_lists_every_verb(capsys, words):
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("usage: vlm VERB [options]\n")
    for verb, (_, text) in VERBS.items():
        assert any(
            line.split()[: len(verb)] == list(verb) and line.endswith(text)
            for line in out.splitlines()
        )


def test_the_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vlm {vlm.__version__}\n"


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_explains_itself(capsys, verb):
    with pytest.raises(SystemExit) as stopped:
        main([*verb, "--help"])
    assert stopped.value.code == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: vlm {' '.join(verb)} ")
    assert "--help" in out
    assert err == ""


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (["trian"], "train"),
        (["serach", "--text", "cat"], "search"),
        (["tokenizer"], "tokenizer train"),
        (["tokeniser", "train"], "tokenizer train"),
        (["data", "chekc"], "data check"),
        (["evla", "retrieval"], "eval retrieval"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_unknown_verb_is_answered_with_the_nearest(capsys, words, nearest):
    said = complaint(capsys, *words)
    assert said.startswith("there is no verb ")
    assert said.endswith(f"; did you mean `vlm {nearest}`?")


def test_the_first_word_of_a_verb_is_answered_with_what_may_follow(capsys):
    said = complaint(capsys, "data", "###")
    assert said == ("there is no verb 'data ###'; expected one of data index, data check")


def test_a_verb_like_none_is_answered_with_all(capsys):
    said = complaint(capsys, "xyzzy")
    assert said.startswith("there is no verb 'xyzzy'; expected one of ")
    assert all(" ".join(verb) in said for verb in VERBS)


@pytest.mark.parametrize(
    ("words", "key", "nearest"),
    [
        (["train", "--sede", "1"], "sede", "seed"),
        (
            ["train", "--optimizer.lerning_rate", "1"],
            "optimizer.lerning_rate",
            "optimizer.learning_rate",
        ),
        (["train", "--data.batchsize=4"], "data.batchsize", "data.batch_size"),
        (["embed", "b", "--images", "i", "--outt", "x"], "outt", "out"),
    ],
    ids=["top level", "nested", "with a sign", "another verb"],
)  # fmt: skip
def test_an_unknown_flag_is_answered_with_the_nearest(capsys, words, key, nearest):
    assert complaint(capsys, *words) == f"there is no option {key!r}; did you mean {nearest!r}?"


def test_a_flag_like_none_is_named(capsys):
    assert complaint(capsys, "train", "--xyzzy", "1") == "there is no option 'xyzzy'"


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("sede: 1\n", "sede", "seed"),
        ("optimizer:\n  lerning_rate: 1\n", "lerning_rate", "optimizer.learning_rate"),
        ("modle:\n  embed_dim: 8\n", "modle.embed_dim", "model.embed_dim"),
    ],
    ids=["top level", "nested", "a whole part"],
)
def test_an_unknown_key_in_a_file_is_answered_with_the_nearest(
    capsys, an_empty_folder, text, key, nearest
):
    (an_empty_folder / "config.yaml").write_text(text)
    said = complaint(capsys, "train", "--config", "config.yaml")
    assert said == f"there is no option {key!r}; did you mean {nearest!r}?"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--data.workers", "many"], "data.workers is many; expected a whole number"),
        (["train", "--precision", "fp8"], "precision is fp8; expected 'fp32' or 'bf16'"),
        (
            ["train", "--adapt.text_unlocked_groups", "all"],
            "adapt.text_unlocked_groups is all; expected a whole number",
        ),
        (
            ["train", "--model.multiway.layers", "many"],
            "model.multiway.layers is many; expected a whole number",
        ),
        (["search", "i", "--text", "a", "--k", "all"], "k is all; expected a whole number"),
        (
            ["eval", "retrieval", "b", "--duplicates", "by luck"],
            "duplicates is by luck; expected 'by id' or 'by string'",
        ),
        (
            ["eval", "retrieval", "b", "--allowed_share", "few"],
            "allowed_share is few; expected a number",
        ),
    ],
    ids=[
        "a number", "a choice", "a number or none", "a part", "another verb", "a choice or none",
        "a share or none",
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_type_is_answered_with_what_was_expected(capsys, words, said):
    assert complaint(capsys, *words) == said


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_names_types_as_a_person_would(capsys, verb):
    with pytest.raises(SystemExit):
        main([*verb, "--help"])
    out = " ".join(capsys.readouterr().out.split())
    for name in ("Literal[", "Optional[", "Union[", "<class", "typing."):
        assert name not in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["eval", "calibrate", "b", "--data", "x", "y"],
            "--data takes one value; found 'y' behind it as well",
        ),
        (
            ["eval", "calibrate", "b", "--data=x", "/some/y"],
            "--data takes one value; found '/some/y' behind it as well",
        ),
        (
            ["eval", "retrieval", "b", "--json", "y"],
            "--json takes no value; found 'y' behind it as well",
        ),
        (["index", "a", "b", "--out", "x"], "found 'b', which no option takes; expected options"),
    ],
    ids=["one value", "with a sign", "no value", "behind none"],
)
def test_a_value_too_many_is_answered_with_the_option_before_it(capsys, words, said):
    assert complaint(capsys, *words).startswith(said)


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["eval", "retrieval", "b", "--data", "x=1", "--data", "y=2"], "--data"),
        (["eval", "calibrate", "b", "--where", "a=1", "--where=b=2"], "--where"),
        (["eval", "retrieval", "b", "--index", "Flat", "--index", "HNSW8"], "--index"),
    ],
    ids=" ".join,
)
def test_an_option_of_many_values_is_given_once(capsys, words, option):
    assert complaint(capsys, *words) == (
        f"{option} is given 2 times; expected once, with all its values behind it"
    )


def test_a_value_of_the_wrong_type_in_a_file_is_named_with_its_key(capsys, an_empty_folder):
    (an_empty_folder / "config.yaml").write_text("data:\n  batch_size: many\n")
    said = complaint(capsys, "train", "--config", "config.yaml")
    assert "batch_size" in said
    assert "many" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--preprocess.interpolation", "magic"], "expected bicubic or bilinear"),
        (["train", "--captions.main_ratio", "3"], "a ratio in [0, 1]"),
        (["train", "--checkpoint.keep", "0"], "expected at least 0 and at least 1"),
        (["train", "--model.multiway.layers", "0"], "layers is 0; expected an integer"),
        (
            ["convert", "x", "--to", "y", "--preprocess.std", "[0,1,1]"],
            "std is (0.0, 1.0, 1.0); expected",
        ),
    ],
    ids=["interpolation", "share", "checkpoints", "a part", "a part of a conversion"],
)
def test_a_value_out_of_its_range_is_answered_with_the_range(capsys, words, said):
    assert said in complaint(capsys, *words)


@pytest.mark.parametrize(
    "text", ["a: [1\n", "- a\n", "just text\n"], ids=["broken YAML", "a list", "a text"]
)
def test_a_file_that_is_no_configuration_is_refused(capsys, an_empty_folder, text):
    (an_empty_folder / "config.yaml").write_text(text)
    assert "config" in complaint(capsys, "train", "--config", "config.yaml")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["train", "--config", "gone.yaml"], ["gone.yaml"]),
        (["train", "--config", "."], ["not a file"]),
        (["train"], ["tokenizers/emoji-zh-en", "no tokenizer"]),
        (["quickstart"], ["there is no configs/train/emoji.yaml"]),
        (["tokenizer", "train", "--zh", "gone", "--out", "x"], ["gone is missing"]),
        (["tokenizer", "extend", "gone", "--zh", "x", "--out", "y"], ["gone holds no tokenizer"]),
        (["tokenizer", "import", "gone", "--out", "y"], ["there is no tokenizer gone"]),
        (["tokenizer", "prune", "gone", "--zh", "x", "--out", "y"], ["gone holds no tokenizer"]),
        (["tokenizer", "report", "gone", "--zh", "x"], ["gone"]),
        (["grow", "gone", "--tokenizer", "x", "--out", "y"], ["gone is not a bundle"]),
        (["data", "check", "gone"], ["gone is not a folder"]),
        (["data", "index", "gone"], ["gone is not a folder"]),
        (["eval", "retrieval", "gone"], ["gone is not a bundle"]),
        (["embed", "gone", "--images", "x", "--out", "y"], ["gone is not a bundle"]),
        (["index", "gone", "--out", "y"], ["gone holds no embeddings"]),
        (["search", "gone", "--text", "cat"], ["gone is not a search index"]),
    ],
    ids=lambda value: " ".join(value[:3]) if value and value[0] in {v[0] for v in VERBS} else "",
)
def test_what_is_not_there_is_named(capsys, an_empty_folder, words, parts):
    said = complaint(capsys, *words)
    assert all(part in said for part in parts)
    assert list(an_empty_folder.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["embed"], "required: bundle, out"),
        (["embed", "b", "--out", "x"], "either --images FOLDER or --data FOLDER"),
        (["embed", "b", "--out", "x", "--images", "i", "--data", "d"], "either --images"),
        (["search", "i"], "either --text TEXT or --image FILE"),
        (["search", "i", "--text", "t", "--image", "f"], "either --text TEXT or --image FILE"),
    ],
    ids=["nothing", "neither source", "both sources", "no query", "two queries"],
)
def test_missing_or_contradicting_options_are_named(capsys, words, said):
    assert said in complaint(capsys, *words)


def test_a_fault_of_the_system_is_told_without_its_number_and_the_file_once(capsys, monkeypatch):
    def read(_):
        try:
            Path("gone").read_text(encoding="utf-8")
        except OSError as error:
            raise VlmError(f"cannot read gone: {error}") from error

    monkeypatch.setattr("vlm.cli.main._run", read)
    assert complaint(capsys) == "cannot read gone: No such file or directory"


def test_results_go_to_stdout(capsys, an_empty_folder):
    write_split(an_empty_folder / "data", make_samples(7), split="train")
    write_split(an_empty_folder / "data", make_samples(2), split="val")
    assert main(["data", "check", "data"]) == 0
    out, err = capsys.readouterr()
    assert out == "train: 7 samples, all readable\nval: 2 samples, all readable\n"
    assert err == ""


def test_the_module_prints_its_help_and_succeeds():
    result = run_module("--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: vlm VERB [options]\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data", "check", "gone"], "gone is not a folder; expected a data folder"),
        (["train", "--sede", "1"], "there is no option 'sede'; did you mean 'seed'?"),
    ],
    ids=["an error of the package", "an error of the parser"],
)
def test_the_module_fails_with_one_line_and_no_traceback(words, said):
    result = run_module(*words)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"vlm: {said}")
