"""A dataclass of options is filled from a shell and a file, or refused in one line."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from vlm.cli.parsing import parse, part_of
from vlm.cli.train import Options as TrainOptions
from vlm.errors import ConfigError, VlmError
from vlm.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Source:
    """A part that a list has as an entry."""

    path: Path
    languages: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part with a check of its own."""

    steps: int = 3
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps}; expected at least 1")


@dataclass(frozen=True)
class Options:
    """Every kind of option."""

    bundle: Path
    """Folder of a bundle."""
    _: KW_ONLY
    config: Path | None = None
    text: str | None = None
    image: Path | None = None
    name: str = "plain"
    k: int | None = None
    kind: Literal["near", "far"] | None = None
    json: bool = False
    where: tuple[str, ...] = ()
    data: tuple[str | Source, ...] = ("data/emoji",)
    part: Part = field(default_factory=Part)
    fields: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A verb with a list of parts."""

    config: Path | None = None
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class ManyFolders:
    """A verb of several folders."""

    folders: tuple[Path, ...]


def read(*words, kind=Options):
    return parse(kind, words, prog="vlm verb", description="")


def complaint(*words, kind=Options):
    with pytest.raises(VlmError) as refused:
        read(*words, kind=kind)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.fixture
def in_file(tmp_path, monkeypatch):
    """Return what writes a configuration file and gives the words that name it."""
    monkeypatch.chdir(tmp_path)

    def write(text, *words):
        (tmp_path / "config.yaml").write_text(text)
        return *words, "--config", "config.yaml"

    return write


@pytest.mark.parametrize(
    "text",
    ["#cat", "~", "null", "NULL", "&x", "*x", "12", "1e5", "true", "[a]", "{a: b}", "a: b", "-x",
     "'q'", '"q"', "@x", "!x", "%x", "猫 # 狗", ""],
)  # fmt: skip
def test_texts_and_paths_are_taken_as_the_shell_passed_them(text):
    given = ["--text", text, "--image", text, "--name", text, "--where", text, "b", "--data", text]
    options = read("bundle", *given)
    assert (options.text, options.image, options.name) == (text, Path(text), text)
    assert (options.where, options.data) == ((text, "b"), (text,))


@pytest.mark.parametrize("name", ["#1", "~", "null", "12"])
def test_a_path_by_position_is_taken_as_the_shell_passed_it(name):
    assert read(name).bundle == Path(name)
    assert read(name, "b", kind=ManyFolders).folders == (Path(name), Path("b"))


def test_null_in_a_file_is_null(in_file):
    options = read(*in_file("text: null\nimage: ~\nk: null\n", "b"))
    assert (options.text, options.image, options.k) == (None, None, None)


def test_what_the_shell_says_goes_before_a_file(in_file):
    words = in_file("text: a\nwhere: [a, b]\nk: 3\npart: {steps: 4}\n", "b")
    assert read(*words).where == ("a", "b")
    options = read(*words, "--text", "c", "--where", "d", "--part.steps", "5")
    assert (options.text, options.where, options.k, options.part.steps) == ("c", ("d",), 3, 5)


def test_entries_of_a_list_may_have_settings_of_their_own(in_file):
    options = read(*in_file("data: [a=b, {path: x, languages: [zh]}]\n", "b"))
    assert options.data == ("a=b", Source(path=Path("x"), languages=("zh",)))


def test_an_entry_of_a_list_without_settings_is_refused(in_file):
    said = "parts has an entry without settings; expected at least one in each"
    assert complaint("--parts", '[{"steps": 4}, {}]', kind=Parts) == said
    assert complaint(*in_file("parts:\n- {steps: 4}\n- {}\n"), kind=Parts) == said
    assert read("--parts", '[{"steps": 4}]', kind=Parts).parts == (Part(steps=4),)


def test_a_mapping_has_an_option_for_each_name_with_all_its_values(in_file):
    found = read("bundle", "--fields.zh", "a", "b: c", "--fields.en=d", "--where", "e")
    assert found.fields == {"zh": ("a", "b: c"), "en": ("d",)}
    assert read(*in_file("fields: {zh: [a]}", "bundle")).fields == {"zh": ("a",)}
    for words, said in (
        (["--fields.zh"], "--fields.zh lacks its value; expected list of texts"),
        (["--fields", "a"], "fields is a; expected list of texts by name"),
        (["--fields.zh", "a", "--fields.zh", "b"], "--fields.zh is given twice"),
    ):
        assert complaint("bundle", *words).startswith(said)


def test_a_flag_needs_no_value():
    assert not read("b").json
    assert read("--json", "b").json
    assert read("b", "--json", "true").json
    assert not read("b", "--json=false").json


def test_paths_in_a_file_start_from_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "part.yaml").write_text("steps: 7\n")
    (tmp_path / "configs/run.yaml").write_text("part: part.yaml\nimage: a.png\n")
    monkeypatch.chdir(tmp_path)
    options = read("b", "--config", "configs/run.yaml")
    assert (options.part.steps, options.image) == (7, Path("a.png"))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("a: [1\nb: 2\n", ", line 2 is not YAML: expected ',' or ']', but got ':'"),
        (
            'a: "\a"\n',
            " is not YAML: unacceptable character #x0007: special characters are not allowed in "
            '"<unicode string>", position 4',
        ),
        ("", " holds no settings by name; expected YAML such as `a: 1`"),
        ("- a\n- b\n", " holds no settings by name; expected YAML such as `a: 1`"),
    ],
    ids=["not YAML", "character", "empty", "list"],
)
def test_a_file_without_settings_is_named(tmp_path, content, found):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    assert complaint("b", "--config", str(path)) == f"{path}{found}"


def test_a_setting_of_another_type_in_a_file_is_named(in_file):
    assert complaint(*in_file("image: [a, b]\n", "b")).startswith("image is")


def test_the_file_of_a_part_that_is_missing_is_said_to_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = complaint("b", "--part", "gone.yaml")
    assert found == f"part is gone.yaml, which is missing; relative paths start from {tmp_path}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the following arguments are required: bundle"),
        (["b", "--k", "all"], "k is all; expected integer or null"),
        (["b", "--kind", "by luck"], "kind is by luck; expected near or far or null"),
        (["b", "--json=maybe"], "json is maybe; expected true or false"),
        (["b", "--part.steps", "many"], "part.steps is many; expected integer"),
        (["b", "--part.steps", "0"], "steps is 0; expected at least 1"),
        (["b", "--part.names", "a"], "part.names is a; expected list of texts"),
        (["b", "--part", "15"],
         "part is 15; expected its settings by name, or a YAML file with them"),
        (["b", "--text"], "--text lacks its value; expected text or null"),
        (["b", "--where", "--json"], "--where lacks its value; expected list of texts"),
        (["b", "--where", "a", "--where=b"],
         "--where is given twice; expected once, with all its values"),
        (["b", "--json", "c"], "found the argument 'c'; expected `vlm verb BUNDLE [options]`"),
        (["b", "--tex", "c"], "there is no option 'tex'; did you mean 'text'?"),
        (["b", "--part.stesp=3"], "there is no option 'part.stesp'; did you mean 'part.steps'?"),
        (["b", "-x"], "there is no option 'x'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_mistake_on_the_command_line_is_one_sentence(words, said):
    assert complaint(*words) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tex: a\n", "there is no option 'tex'; did you mean 'text'?"),
        ("part: {stesp: 3}\n", "there is no option 'stesp'; did you mean 'part.steps'?"),
        ("part: 15\n", "part is 15; expected its settings by name"),
        ("part: [a, b]\n", "part is ['a', 'b']; expected its settings by name"),
        ("part: far\n",
         "part is far; expected its settings by name, or a YAML file with them"),
        ("part: {steps: many}\n", "part.steps is many; expected integer"),
        ("part: {steps: 0}\n", "steps is 0; expected at least 1"),
        ("text: 3\n",
         "text is 3; expected text or null, in quotes where YAML takes it for a number"),
        ("json: sometimes\n", "json is sometimes; expected true or false"),
        ("where: a\n", "where is a; expected list of texts"),
        ("where: [3]\n", "where is 3; expected list of texts"),
        ("data: a\n", "data is a; expected list of (text or settings)"),
        ("data: [3]\n", "data is 3; expected list of (text or settings)"),
        ("data: [{path: x, langauges: [zh]}]\n",
         "there is no option 'data.langauges'; did you mean 'data.languages'?"),
        ("data: [{path: x, languages: zh}]\n",
         "data.languages is zh; expected list of texts or null"),
        ("data: [{languages: [zh]}]\n", "data lacks path"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file_is_one_sentence(in_file, text, said):
    assert complaint(*in_file(text, "b")) == said


@pytest.mark.parametrize("text", ["a: [1\n", "- a\n", "just text\n", ""])
def test_a_file_that_is_no_configuration_is_refused(in_file, text):
    assert "config" in complaint(*in_file(text, "b"))


def test_a_file_of_other_bytes_is_refused(in_file, tmp_path):
    words = in_file("", "b")
    (tmp_path / "config.yaml").write_bytes(b"text: \xff\n")
    assert "not UTF-8" in complaint(*words)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("sede", "seed"),
        ("gradient_accumulation_steps", "loss.micro_batches"),
        ("lr", "optimizer.learning_rate"),
        ("data.batchsize", "data.batch_size"),
        ("model.multiway.layrs", "model.multiway.layers"),
    ],
)
def test_a_setting_by_another_name_is_answered_with_the_one_that_is_meant(in_file, key, meant):
    said = f"there is no option {key!r}; did you mean {meant!r}?"
    assert complaint(f"--{key}", "1", kind=TrainOptions) == said
    if "." not in key:
        assert complaint(*in_file(f"{key}: 1\n"), kind=TrainOptions) == said


def test_options_hold_the_configuration_of_a_run():
    options = read("--seed", "3", "--data.keep_decoded", kind=TrainOptions)
    config = part_of(options, TrainConfig)
    assert type(config) is TrainConfig
    assert (config.seed, config.data.keep_decoded) == (3, True)


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ([], "never"),
        (["--resume"], "auto"),
        (["--resume", "--seed", "3"], "auto"),
        (["--resume", "auto"], "auto"),
        (["--resume", "runs/a/checkpoints/step-00000500"], "runs/a/checkpoints/step-00000500"),
        (["--resume=never", "--seed", "3"], "never"),
    ],
)
def test_an_option_may_have_a_value_that_it_has_alone(words, value):
    assert read(*words, kind=TrainOptions).resume == value
