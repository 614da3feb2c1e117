"""The color font that Noto's country flags are drawn from; no package of SVGs has them."""

import io
import struct
import tarfile
from pathlib import Path

from tools.packages import download_folder, run_tool
from vlm.errors import DataError
from vlm.files import write_file

FONT_VERSION = "2.042"
DEBIAN_PACKAGE = "fonts-noto-color-emoji"

_FILE_NAME = "NotoColorEmoji.ttf"
_PATH = f"usr/share/fonts/truetype/noto/{_FILE_NAME}"
_TABLE_RECORD = struct.Struct(">4s4xI4x")
_FIRST_TABLE_RECORD = 12


def read_noto_font(cache: Path, *, root: Path = Path("/")) -> bytes:
    """Return the font: the one in `cache`, else the installed one, else Debian's.

    What is not in `cache` yet is kept there.

    Args:
        cache: Folder of the downloads.
        root: Where Debian's packages are installed.

    Raises:
        DataError: there is no font of the right version and apt-get cannot download it.
    """
    cached, installed = cache / _FILE_NAME, root / _PATH
    if cached.is_file():
        return _checked(cached.read_bytes(), origin=f"{cached}; remove it and build again")
    if installed.is_file() and font_version(installed.read_bytes()) == FONT_VERSION:
        return installed.read_bytes()
    font = _checked(_download(cache), origin=f"Debian's {DEBIAN_PACKAGE}; {_advice(cache)}")
    write_file(cached, font)
    return font


def font_version(font: bytes) -> str | None:
    """Return the version of a TrueType font with three decimals, or None for other files."""
    try:
        _, tables = struct.unpack_from(">IH", font)
        for index in range(tables):
            tag, offset = _TABLE_RECORD.unpack_from(
                font, _FIRST_TABLE_RECORD + index * _TABLE_RECORD.size
            )
            if tag == b"head":
                (fixed_point,) = struct.unpack_from(">I", font, offset + 4)
                return f"{fixed_point / 0x10000:.3f}"
    except struct.error:
        return None
    return None


def _checked(font: bytes, *, origin: str) -> bytes:
    found = font_version(font)
    if found != FONT_VERSION:
        raise DataError(
            f"the flags need Noto Color Emoji {FONT_VERSION}, found version {found} in {origin}"
        )
    return font


def _download(cache: Path) -> bytes:
    purpose = f"get {DEBIAN_PACKAGE} {FONT_VERSION}"
    with download_folder(cache) as folder:
        try:
            run_tool(["apt-get", "download", DEBIAN_PACKAGE], folder=folder, purpose=purpose)
            (package,) = folder.glob("*.deb")
            tar = run_tool(
                ["dpkg-deb", "--fsys-tarfile", package.name], folder=folder, purpose=purpose
            )
        except DataError as error:
            raise DataError(f"{error}; {_advice(cache)}") from error
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        for member in archive:
            content = archive.extractfile(member) if member.name.endswith(_FILE_NAME) else None
            if content is not None:
                return content.read()
    raise DataError(f"cannot {purpose}: {DEBIAN_PACKAGE} holds no {_FILE_NAME}; {_advice(cache)}")


def _advice(cache: Path) -> str:
    return (
        f"install {DEBIAN_PACKAGE} of version {FONT_VERSION}, or put its {_FILE_NAME} into {cache}"
    )
