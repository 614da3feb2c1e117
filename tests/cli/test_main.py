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

HEAVY = ["torch", "open_clip", "torchvision", "timm", "accelerate", "faiss", "pyarrow"]
HEAVY += ["matplotlib"]
WATCHED = """
import sys
from vlm.cli.main import main
try:
    code = main(sys.argv[2:])
except SystemExit as stopped:
    code = stopped.code
imported = [name for name in sys.argv[1].split() if name in sys.modules]
assert not imported, imported
sys.exit(code)
"""


WATCHED_HELP = """
import sys
from vlm.cli.main import VERBS, main
for verb in VERBS:
    try:
        main([*verb, "--help"])
    except SystemExit as stopped:
        assert stopped.code == 0, verb
    imported = [name for name in sys.argv[1].split() if name in sys.modules]
    assert not imported, (verb, imported)
"""


@pytest.fixture(autouse=True)
def an_empty_folder(tmp_path, monkeypatch):
    """Run every test where no configuration, data or tokenizer of the project lies."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def complaint(capsys, *words):
    """Return the one line that the command prints before it fails."""
    code = main(list(words))
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.startswith("vlm: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err.removeprefix("vlm: ").removesuffix("\n")


def run_python(*words, **environment):
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONWARNINGS": "default"} | environment,
    )  # fmt: skip


def help_of(capsys, verb):
    with pytest.raises(SystemExit) as stopped:
        main([*verb, "--help"])
    assert stopped.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


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


@pytest.mark.parametrize("family", sorted({verb[0] for verb in VERBS if len(verb) > 1}))
def test_help_of_a_family_lists_its_verbs(capsys, family):
    assert main([family, "--help"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line[:2] == "  "]
    assert listed == [family] * sum(verb[0] == family for verb in VERBS)


def test_the_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vlm {vlm.__version__}\n"


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_explains_itself_in_words(capsys, verb):
    out = help_of(capsys, verb)
    assert out.startswith(f"usage: vlm {' '.join(verb)} ")
    words = " ".join(out.split())
    for name in ("Literal[", "Optional[", "Union[", "<class", "typing.", "Path to a configuration"):
        assert name not in words


def test_help_of_no_verb_imports_what_takes_seconds():
    done = run_python("-c", WATCHED_HELP, " ".join(HEAVY))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--optimizer.lerning_rate", "1"],
        ["search", "index", "--k", "many"],
        ["eval", "retrieval", "bundle", "--allowed_share", "few"],
        ["trian"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_an_error_in_the_options_imports_nothing_that_takes_seconds(words):
    done = run_python("-c", WATCHED, " ".join(HEAVY), *words)
    assert done.returncode == 2
    assert done.stderr.startswith("vlm: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (["trian"], "train"),
        (["serach", "--text", "cat"], "search"),
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


def test_an_unknown_verb_like_none_is_answered_with_what_may_follow(capsys):
    said = complaint(capsys, "data", "###")
    assert said == (
        "there is no verb 'data ###'; expected one of data show, data index, data check"
    )
    said = complaint(capsys, "xyzzy")
    assert said.startswith("there is no verb 'xyzzy'; expected one of ")
    assert all(" ".join(verb) in said for verb in VERBS)
    said = complaint(capsys, "data")
    assert (
        said
        == "`vlm data` lacks its second word; expected one of data show, data index, data check"
    )


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
        (["tokenizer", "report", "--zh", "x"], ["no folders of tokenizers"]),
        (["grow", "gone", "--tokenizer", "x", "--out", "y"], ["gone is not a bundle"]),
        (["data", "show", "gone"], ["gone is missing"]),
        (["data", "check", "gone"], ["gone is missing"]),
        (["data", "index", "gone"], ["gone is missing"]),
        (["eval", "retrieval", "gone"], ["gone is not a bundle"]),
        (["embed", "gone", "--images", "x", "--out", "y"], ["x is not a folder"]),
        (["index", "gone", "--out", "y"], ["gone holds no embeddings"]),
        (["search", "gone", "--text", "cat"], ["gone is not a search index"]),
        (["embed", "b", "--out", "x"], ["needs --images FOLDER or --data SOURCE"]),
        (["embed", "b", "--out", "x", "--images", "i", "--split", "val"], ["split without data"]),
        (["search", "i"], ["either --text TEXT or --image FILE"]),
        (["search", "i", "--text", "t", "--image", "f"], ["either --text TEXT or --image FILE"]),
    ],
    ids=lambda value: " ".join(value[:3]) if value and value[0] in {v[0] for v in VERBS} else "",
)
def test_what_is_missing_or_contradicts_is_named(capsys, an_empty_folder, words, parts):
    said = complaint(capsys, *words)
    assert all(part in said for part in parts)
    assert list(an_empty_folder.iterdir()) == []


def test_a_fault_of_the_system_is_printed_without_its_number_and_the_file_once(capsys, monkeypatch):
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


def test_a_launcher_that_starts_one_process_of_several_is_pointed_out(monkeypatch, capsys):
    # What `accelerate launch --num_processes 2` leaves on a machine without a GPU.
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert main(["eval", "retrieval", "gone"]) == 2
    warning, error = capsys.readouterr().err.splitlines()
    assert "several processes, but started one" in warning
    assert "configs/accelerate/2-cpus.yaml" in warning
    assert error.startswith("vlm: gone is not a bundle")
    assert main(["data", "check", "gone"]) == 2  # which no processes share
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["eval", "retrieval", "gone"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_output_that_finds_no_space_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "vlm", "--help"], stdout=full, stderr=subprocess.PIPE, text=True,
            check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("vlm: no space left to write: ")
    assert done.stderr.count("\n") == 1
