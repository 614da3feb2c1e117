"""Folders that evaluation verbs write to are looked at before any work is done."""

import pytest

from vlm.cli.main import main
from vlm.cli.options import EvaluationOptions, ReportOptions
from vlm.errors import ConfigError


@pytest.mark.parametrize("option", ["out", "cache"])
@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_file_in_the_place_of_a_folder_is_told_first_and_by_its_option(
    data_folder, tmp_path, capsys, option, below
):
    (tmp_path / "file").write_text("mine")
    asked = tmp_path / "file" / below
    # There is no bundle either, but that is found out only when work begins.
    for words in (["retrieval", "no-bundle", "--data", data_folder], ["classification", "none"]):
        assert main(["eval", *map(str, words), f"--{option}", str(asked)]) == 2
        said = f"--{option} is {asked}, but {tmp_path / 'file'} is not a folder; expected"
        assert capsys.readouterr().err.startswith(f"vlm: {said}")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_verb_without_an_embedder_names_its_option_as_well(tmp_path):
    (tmp_path / "file").write_text("mine")
    options = ReportOptions(out=tmp_path / "file", json=True)
    with pytest.raises(ConfigError, match=r"--out is .*file is not a folder"):
        options.deliver({}, record_name="r.json", document=pytest.fail, table=pytest.fail)


def test_folders_that_are_there_or_can_be_are_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    for name in (".", "new", "new/deeper", "link", "link/new"):
        EvaluationOptions(out=type(tmp_path)(name), cache=tmp_path / name).check_folders()
    ReportOptions().check_folders()
    assert [path.name for path in tmp_path.iterdir()] == ["link"]
