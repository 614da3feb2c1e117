"""Files and folders appear whole or not at all, and a full disk is one clear sentence."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from vlm.errors import VlmError
from vlm.files import sha256_of, write_file, write_folder

LIMITED = """
import resource, signal, sys
from pathlib import Path

from vlm.errors import VlmError
from vlm.files import write_file, write_folder

path, how = Path(sys.argv[1]), sys.argv[2]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit fails instead of killing
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    if how == "file":
        write_file(path, b"n" * 5000)
    elif how == "file within the limit":
        write_file(path, b"n" * 4000)
    else:
        with write_folder(path) as folder:
            if how == "folder":
                (folder / "big").write_bytes(b"n" * 5000)
            else:
                import numpy as np
                from safetensors.numpy import save_file  # as torch's, without its seconds of import

                save_file({"weights": np.zeros(5000)}, folder / "big.safetensors")
except VlmError as error:
    print(f"VlmError: {error}")
"""
"""Writes to a path under a real limit on the size of files."""


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder by its relative path, hidden ones included."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def write_with_limit(path: Path, how: str) -> str:
    return subprocess.run(
        [sys.executable, "-B", "-c", LIMITED, str(path), how],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip


def fill_half(path: Path, error: BaseException) -> None:
    with write_folder(path) as folder:
        (folder / "new").write_bytes(b"half")
        raise error


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_a_file_of_any_size_has_the_hash_of_its_bytes(tmp_path, size):
    content = bytes(number % 251 for number in range(1000)) * (size // 1000 + 1)
    (tmp_path / "file").write_bytes(content[:size])
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content[:size]).hexdigest()


def test_a_file_is_written_into_a_folder_that_was_not_there(tmp_path):
    write_file(tmp_path / "a" / "b" / "file.txt", b"new")
    assert contents(tmp_path) == {"a/b/file.txt": b"new"}


def test_a_folder_that_cannot_be_made_is_an_error_of_the_users(tmp_path):
    for parent in (Path("/proc/nope"), tmp_path / ("a" * 300)):
        with pytest.raises(VlmError, match="cannot write"):
            write_file(parent / "config.yaml", b"new")


def test_a_file_replaces_the_old_one_and_leaves_nothing_else(tmp_path):
    write_file(tmp_path / "file.txt", b"a long old content")
    write_file(tmp_path / "file.txt", b"new")
    assert contents(tmp_path) == {"file.txt": b"new"}


def test_a_folder_is_filled_before_it_appears(tmp_path):
    with write_folder(tmp_path / "out") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_bytes(b"new")
        assert not (tmp_path / "out").exists()
        assert folder.parent == tmp_path  # the same disk, so that the move is a rename
    assert contents(tmp_path) == {"out/deep/file": b"new"}


def test_a_folder_replaces_the_old_one_entirely(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_bytes(b"old")
    with write_folder(tmp_path / "out") as folder:
        (folder / "new").write_bytes(b"new")
        assert contents(tmp_path / "out") == {"old": b"old"}
    assert contents(tmp_path) == {"out/new": b"new"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, VlmError])
def test_an_exception_inside_leaves_the_old_folder_and_nothing_partial(tmp_path, error):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_bytes(b"old")
    with pytest.raises(error, match="stop"):
        fill_half(tmp_path / "out", error("stop"))
    assert contents(tmp_path) == {"out/old": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_exception_inside_leaves_no_folder_where_there_was_none(tmp_path):
    with pytest.raises(ValueError, match="stop"):
        fill_half(tmp_path / "out", ValueError("stop"))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_behind_does_not_enter_the_folder(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").write_bytes(b"half")
    with write_folder(tmp_path / "out") as folder:
        (folder / "new").write_bytes(b"new")
    assert contents(tmp_path) == {"out/new": b"new"}


@pytest.mark.parametrize("how", ["folder", "safetensors"])
def test_a_full_disk_is_one_sentence_and_leaves_the_old_folder(tmp_path, how):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_bytes(b"old")
    said = write_with_limit(tmp_path / "out", how)
    assert said.startswith(f"VlmError: no space left to write {tmp_path / 'out'}: ")
    assert "File too large" in said
    assert contents(tmp_path) == {"out/old": b"old"}


def test_a_full_disk_leaves_the_old_file(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    said = write_with_limit(tmp_path / "file", "file")
    assert said == f"VlmError: no space left to write {tmp_path / 'file'}: File too large\n"
    assert (tmp_path / "file").read_bytes() == b"old"


def test_the_limit_of_these_tests_lets_smaller_files_pass(tmp_path):
    assert write_with_limit(tmp_path / "file", "file within the limit") == ""
    assert (tmp_path / "file").read_bytes() == b"n" * 4000


def test_a_file_in_the_place_of_a_parent_folder_is_named(tmp_path):
    (tmp_path / "parent").write_bytes(b"")
    with (
        pytest.raises(VlmError, match=r"cannot write .*parent.child: Not a directory"),
        write_folder(tmp_path / "parent" / "child"),
    ):
        pass
