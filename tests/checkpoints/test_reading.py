"""Tensors come out of every kind of file, under every wrapping, and no file's code is run."""

import json
import os
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from vlm.checkpoints.reading import find_weights, in_float32, read_tensors
from vlm.errors import CheckpointError

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor(7)}


def same(found, expected=None):
    expected = TENSORS if expected is None else expected
    return found.keys() == expected.keys() and all(found[n].equal(expected[n]) for n in expected)


@pytest.mark.parametrize("key", [None, "state_dict", "module", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_forward_module.", "_forward_module.module."])
def test_wrappings_of_training_programs_are_taken_away(tmp_path, key, prefix):
    content = {prefix + name: tensor for name, tensor in TENSORS.items()}
    torch.save(content if key is None else {key: content, "epoch": 3}, tmp_path / "x.pt")
    assert same(read_tensors(tmp_path / "x.pt"))


@pytest.mark.parametrize("key", [None, "state_dict"])
def test_archives_of_torchs_older_format_are_read(tmp_path, key):
    content = TENSORS if key is None else {key: TENSORS}
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    assert same(read_tensors(tmp_path / "x.pt"))


def test_a_prefix_of_some_names_only_is_a_part_of_them(tmp_path):
    tensors = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    torch.save(tensors, tmp_path / "x.pt")
    assert same(read_tensors(tmp_path / "x.pt"), tensors)


def test_what_a_file_is_follows_from_its_content_not_from_its_name(tmp_path):
    save_file(TENSORS, tmp_path / "x.pt")
    assert same(read_tensors(tmp_path / "x.pt"))


def test_a_pickle_that_calls_itself_safetensors_is_refused(tmp_path):
    torch.save(TENSORS, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"cannot read the weights \S*x\.safetensors"):
        read_tensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize("content", [b"", b"hello"])
def test_what_is_no_weights_file_is_said_to_be_none(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="neither safetensors nor a file of torch's"):
        read_tensors(tmp_path / "x.pt")


def test_the_files_of_an_index_are_read_together(tmp_path):
    names = list(TENSORS)
    for number, name in enumerate(names):
        save_file({name: TENSORS[name]}, tmp_path / f"model-{number}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    files = {name: f"model-{number}.safetensors" for number, name in enumerate(names)}
    index.write_text(json.dumps({"weight_map": files}))
    assert find_weights(tmp_path) == index
    assert same(read_tensors(index))
    index.write_text(json.dumps({"weight_map": files | {"c": "model-0.safetensors"}}))
    with pytest.raises(CheckpointError, match="names c, which its files do not hold"):
        read_tensors(index)


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors"])
def test_an_index_cannot_name_files_elsewhere(tmp_path, name):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="expected files of its own folder"):
        read_tensors(index)


@pytest.mark.parametrize("content", [{}, {"weight_map": 3}, {"weight_map": {"a": 3}}])
def test_an_index_without_a_map_is_refused(tmp_path, content):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="no weight_map"):
        read_tensors(index)


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("new", [True, False], ids=["archive", "old archive"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, new):
    trace = tmp_path / "trace"
    content = {"state_dict": TENSORS, "args": Attack(trace)}
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
    with pytest.raises(CheckpointError, match=r"wants to run the code posix\.mkdir"):
        read_tensors(tmp_path / "x.pt")
    assert not trace.exists()


def test_a_plain_pickle_is_refused_and_not_run(tmp_path):
    trace = tmp_path / "trace"
    (tmp_path / "x.pt").write_bytes(pickle.dumps(Attack(trace)))
    with pytest.raises(CheckpointError, match=r"x\.pt"):
        read_tensors(tmp_path / "x.pt")
    assert not trace.exists()


def test_a_torchscript_archive_is_refused_with_the_reason(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"x/{name}", b"")
    with pytest.raises(CheckpointError, match="TorchScript archive, which is a program"):
        read_tensors(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 no", b"nothing of the kind", b"\x10\0\0\0\0\0\0\0{broken"]
)
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.pt"):
        read_tensors(tmp_path / "x.pt")


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"epoch": 1}, {}, {"state_dict": {}}])
def test_a_file_without_tensors_by_name_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="tensors by name"):
        read_tensors(tmp_path / "x.pt")


def test_a_missing_file_and_a_folder_without_weights_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="there is no file"):
        read_tensors(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="holds no weights; expected one of open_clip_model"):
        find_weights(tmp_path)


def test_halves_become_float32_and_counts_stay():
    found = in_float32(
        {"h": torch.ones(2).half(), "b": torch.ones(2).bfloat16(), "n": TENSORS["b"]}
    )
    assert [tensor.dtype for tensor in found.values()] == [
        torch.float32, torch.float32, torch.int64,
    ]  # fmt: skip


def test_a_text_in_the_place_of_weights_is_said_to_be_none(tmp_path):
    (tmp_path / "model.pt").write_text("# A page\n")
    with pytest.raises(
        CheckpointError, match="is not a weights file; expected safetensors or what"
    ):
        read_tensors(tmp_path / "model.pt")
