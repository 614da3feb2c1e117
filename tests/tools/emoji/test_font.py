"""The flags' font has one version, wherever it comes from."""

import io
import struct
import tarfile

import pytest

from tools.emoji import font
from tools.emoji.font import font_version, read_noto_font
from vlm.errors import DataError


def make_font(version):
    """Return the start of a TrueType font: its list of tables and the version in `head`."""
    tables = struct.pack(">4s4xII", b"cmap", 44, 0) + struct.pack(">4s4xII", b"head", 44, 8)
    head = struct.pack(">II", 0x10000, round(version * 0x10000))
    return struct.pack(">IH6x", 0x10000, 2) + tables + head


@pytest.fixture
def debian(monkeypatch):
    """Replace Debian's tools by ones that deliver a font of the given version."""

    def serve(version):
        content = make_font(version)
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            member = tarfile.TarInfo("./usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

        def tool(command, *, folder, purpose):
            if command[0] == "apt-get":
                (folder / "fonts-noto-color-emoji.deb").touch()
                return b""
            return buffer.getvalue()

        monkeypatch.setattr(font, "run_tool", tool)

    return serve


def test_the_version_is_read_from_the_head_table():
    assert font_version(make_font(2.042)) == "2.042"


@pytest.mark.parametrize("content", [b"", b"not a font", make_font(2.042)[:40]])
def test_other_files_have_no_version(content):
    assert font_version(content) is None


def test_the_downloaded_font_is_kept_in_the_cache(debian, tmp_path):
    debian(2.042)
    content = read_noto_font(tmp_path / "cache", root=tmp_path)
    assert content == make_font(2.042)
    assert (tmp_path / "cache" / "NotoColorEmoji.ttf").read_bytes() == content


def test_an_installed_font_of_the_right_version_is_used(tmp_path):
    installed = tmp_path / "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
    installed.parent.mkdir(parents=True)
    installed.write_bytes(make_font(2.042))
    assert read_noto_font(tmp_path / "cache", root=tmp_path) == make_font(2.042)


def test_an_installed_font_of_another_version_is_passed_over(debian, tmp_path):
    installed = tmp_path / "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
    installed.parent.mkdir(parents=True)
    installed.write_bytes(make_font(2.051))
    debian(2.042)
    assert read_noto_font(tmp_path / "cache", root=tmp_path) == make_font(2.042)


def test_a_cached_font_of_another_version_is_refused(tmp_path):
    (tmp_path / "NotoColorEmoji.ttf").write_bytes(make_font(2.051))
    with pytest.raises(DataError, match=r"need Noto Color Emoji 2\.042, found version 2\.051 in"):
        read_noto_font(tmp_path, root=tmp_path)


def test_a_newer_debian_is_told_what_to_do(debian, tmp_path):
    debian(2.051)
    with pytest.raises(DataError, match=r"found version 2\.051 in Debian's .*; install fonts-noto"):
        read_noto_font(tmp_path, root=tmp_path)


def test_a_machine_without_apt_is_told_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"apt-get is not on PATH.* install fonts-noto-color-emoji"):
        read_noto_font(tmp_path / "cache", root=tmp_path)
