"""Images, records, tars and rows as an attacker, a broken disk or another program leaves them."""

import os
import struct
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from PIL import Image, PngImagePlugin

from tests.builders import encoded, make_image

Members = Sequence[tuple[str, bytes]]
"""Names and contents of a tar's members, in order."""

NOISE = bytes(i * i * 7 % 251 for i in range(3000))
JPEG = encoded(make_image(1), "JPEG", quality=90)
PNG = encoded(make_image(1))
KEY = "000000005"
"""The sample of the tar that is changed; one of four."""


# Images.


def chunk(kind: bytes, content: bytes) -> bytes:
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def png(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 0) -> bytes:
    """Write a PNG of given chunks by hand."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def one_bit_bomb(side: int) -> bytes:
    """Return a PNG of one colour and a few KiB, whatever its size."""
    rows = zlib.compress(bytes((side // 8 + 2) * side), 9)
    return png(side, side, chunk(b"IDAT", rows), depth=1)


def jpeg_of_size(width: int, height: int) -> bytes:
    at = JPEG.index(b"\xff\xc0") + 5
    return JPEG[:at] + struct.pack(">HH", height, width) + JPEG[at + 4 :]


def gif(frames: int, width: int = 8, height: int = 8) -> bytes:
    data = encoded(make_image(1, size=(8, 8)), "GIF")
    start = data.rindex(b"\x2c\0\0\0\0")
    frame = data[start:-1]
    return data[:6] + struct.pack("<HH", width, height) + data[10:start] + frame * frames + b";"


def with_segment(marker: int, content: bytes) -> bytes:
    return JPEG[:2] + struct.pack(">BBH", 255, marker, len(content) + 2) + content + JPEG[2:]


def with_text(size: int) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", "x" * size, zip=True)
    return encoded(make_image(1), pnginfo=info)


TIFF_LOOP = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\x08\0\0\0"
ROW = chunk(b"IDAT", zlib.compress(bytes(41 * 40)))
IMAGES: Mapping[str, Callable[[], bytes]] = {
    "no bytes": lambda: b"",
    "a text": lambda: b"a cat, and no image",
    "EPS": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n",
    "PDF": lambda: b"%PDF-1.4\n1 0 obj\n",
    "SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="9e9" height="9e9"/>',
    "a TIFF whose directory is its next": lambda: TIFF_LOOP,
    "BMP": lambda: encoded(make_image(1), "BMP"),
    "ICO": lambda: encoded(make_image(1), "ICO"),
    "noise": lambda: NOISE,
    "a JPEG's first bytes and noise": lambda: JPEG[:200] + NOISE,
    "a PNG of 13,000 x 13,000 in 20 KiB": lambda: one_bit_bomb(13_000),
    "a PNG that claims 2**31 pixels a side": lambda: png(2**31 - 1, 2**31 - 1, ROW),
    "a PNG of no pixels": lambda: png(0, 0, ROW),
    "a PNG without pixels": lambda: png(40, 40),
    "a PNG of too few rows": lambda: png(40, 80, ROW),
    "a PNG without its palette": lambda: png(40, 40, ROW, colour=3),
    "a PNG of 1 x 60,000": lambda: encoded(Image.new("RGB", (1, 60_000), "red")),
    "a PNG with 20 MB of XMP": lambda: with_text(20_000_000),
    "a PNG with 400 MB of XMP, packed": lambda: png(
        40, 40,
        chunk(b"zTXt", b"a\0\0" + zlib.compress(zlib.compress(bytes(1 << 24)) * 30)), ROW,
    ),
    "a PNG whose colour profile is noise": lambda: png(
        40, 40, chunk(b"iCCP", b"a\0\0" + NOISE), ROW
    ),
    "a PNG with 2**31 frames": lambda: png(
        40, 40, chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)), ROW
    ),
    "a JPEG that claims 65,500 x 65,500": lambda: jpeg_of_size(65_500, 65_500),
    "a JPEG that claims 9,000 x 7,000": lambda: jpeg_of_size(9_000, 7_000),
    "a JPEG of height 0": lambda: jpeg_of_size(40, 0),
    "a JPEG cut in the middle": lambda: JPEG[: len(JPEG) // 2],
    "a JPEG without its end": lambda: JPEG[:-2],
    "a JPEG that ends in zeros": lambda: JPEG[:-200] + bytes(200),
    "a JPEG whose EXIF points to itself": lambda: with_segment(0xE1, b"Exif\0\0" + TIFF_LOOP),
    "a JPEG whose EXIF is noise": lambda: with_segment(0xE1, b"Exif\0\0II*\0" + NOISE[:900]),
    "a JPEG with noise for more images": lambda: with_segment(0xE2, b"MPF\0II*\0" + NOISE[:900]),
    "a GIF of 100,000 frames": lambda: gif(100_000),
    "a GIF of 65,535 x 65,535": lambda: gif(1, 65_535, 65_535),
    "a GIF without a frame": lambda: gif(0),
    "a WebP that claims 16,384 x 16,384": lambda: (
        b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0\x2f\xff\xff\xff\x0f" + bytes(8)
    ),
    "RIFF alone": lambda: b"RIFF\xff\xff\xff\xffWEBP",
    "16 bits of grey": lambda: encoded(make_image(1).convert("L").convert("I;16")),
    "printing inks": lambda: encoded(make_image(1).convert("CMYK"), "JPEG"),
}  # fmt: skip


# Records.

RECORDS: Mapping[str, bytes] = {
    "no bytes": b"",
    "half of it": b'{"caption": "a c',
    "not UTF-8": b'{"caption": "a c\xe9t"}',
    "UTF-16": '{"caption": "a cat"}'.encode("utf-16"),
    "zero bytes": bytes(600),
    "a list": b'["a cat"]',
    "a number": b"5",
    "NaN for a caption": b'{"caption": NaN}',
    "a number for a caption": b'{"caption": 5}',
    "objects for captions": b'{"captions": {"en": {"en": {"en": "a cat"}}}}',
    "half a character": b'{"caption": "a cat \\ud83d"}',
    "half a character for a language": b'{"captions": {"\\ud83d": ["a cat"]}}',
    "half a character for a label": b'{"caption": "a cat", "labels": {"\\ud83d": "a"}}',
    "half a character for a concept": b'{"caption": "a cat", "concept": "\\ud83d"}',
    "half a character for a field": b'{"caption": "a cat", "\\ud83d": "a"}',
    "lists in lists": b'{"caption": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "lists in lists for a concept": b'{"caption": "a cat", "concept": '
    + b"[" * 900 + b"]" * 900 + b"}",
    "a number of 5,000 digits": b'{"caption": "a cat", "concept": ' + b"9" * 5000 + b"}",
    "a list for labels": b'{"captions": {"en": ["a cat"]}, "labels": [["a"]]}',
    "no caption": b'{"caption": null, "url": "x"}',
    "a caption of spaces": b'{"caption": "  \\n "}',
    "a caption of 8 MB": b'{"caption": "' + b"a cat " * 1_400_000 + b'"}',
}  # fmt: skip


# Tars.


def info(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields: object) -> bytes:
    """Return a member: its header and, in whole blocks, its content."""
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    return member.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def archive(members: Members, *, end: bytes = bytes(1024)) -> bytes:
    return b"".join(info(name, content) for name, content in members) + end


def around(members: Members, raw: bytes) -> bytes:
    """Put raw blocks where the changed sample lay."""
    first = next(place for place, (name, _) in enumerate(members) if name.startswith(KEY))
    rest = [member for member in members[first:] if not member[0].startswith(KEY)]
    return archive(members[:first], end=b"") + raw + archive(rest)


def before(members: Members, raw: bytes) -> bytes:
    """Put raw blocks before the sample that stays as it is."""
    first = next(place for place, (name, _) in enumerate(members) if name.startswith(KEY))
    return archive(members[:first], end=b"") + raw + archive(members[first:])


def replaced(members: Members, extension: str, content: bytes) -> bytes:
    own = {name: text for name, text in members if name.startswith(KEY)}
    image = next(name for name in own if not name.endswith((".txt", ".json")))
    name = image if extension == "image" else f"{KEY}.{extension}"
    return archive([(each, content if each == name else text) for each, text in members])


def renamed(members: Members, change: Callable[[str], str]) -> bytes:
    return archive([(change(name), content) for name, content in members])


def with_size(field: bytes) -> bytes:
    """Return a header whose size is given as it is stored, with the right checksum."""
    header = bytearray(info("README"))
    header[124:136], header[148:156] = field, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def sparse(name: str) -> bytes:
    header = bytearray(info(name, bytes(512), tarfile.GNUTYPE_SPARSE))
    header[386:410], header[483:495] = b"%011o\0%011o\0" % (0, 512), b"%011o\0" % 9000
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    return bytes(header)


def extended(record: bytes) -> bytes:
    return info("pax", record, tarfile.XHDTYPE)


CAPTION = info(f"{KEY}.txt", b"a cat")
TWO = [(f"x.{name}", content) for name, content in (("png", PNG), ("txt", b"a cat"))]
LONG = "".join(chr(0x4E00 + number) for number in range(300))

DAMAGED: Mapping[str, Callable[[Members], bytes]] = {
    "an image that links to another": lambda members: around(
        members, info(f"{KEY}.jpg", kind=tarfile.LNKTYPE, linkname="000000004.png") + CAPTION
    ),
    "an image that links out of the tar": lambda members: around(
        members, info(f"{KEY}.jpg", kind=tarfile.SYMTYPE, linkname="/etc/hostname") + CAPTION
    ),
    "links alone": lambda members: around(
        members,
        info(f"{KEY}.jpg", kind=tarfile.LNKTYPE, linkname="000000004.png")
        + info(f"{KEY}.txt", kind=tarfile.LNKTYPE, linkname="000000004.txt"),
    ),
    "a device for an image": lambda members: around(
        members, info(f"{KEY}.jpg", kind=tarfile.CHRTYPE, devmajor=1, devminor=5) + CAPTION
    ),
    "a pipe for an image": lambda members: around(
        members, info(f"{KEY}.jpg", kind=tarfile.FIFOTYPE) + CAPTION
    ),
    "a folder for an image": lambda members: around(
        members, info(f"{KEY}.jpg", kind=tarfile.DIRTYPE) + CAPTION
    ),
    "an image with holes": lambda members: around(members, sparse(f"{KEY}.jpg") + CAPTION),
    "an image of no bytes": lambda members: replaced(members, "image", b""),
    "no image": lambda members: around(members, CAPTION),
    "no caption": lambda members: around(members, info(f"{KEY}.jpg", JPEG)),
    "an image twice": lambda members: before(members, info(f"{KEY}.jpg", JPEG)),
    "an image in two formats": lambda members: before(members, info(f"{KEY}.png", PNG)),
    "a record twice": lambda members: before(members, info(f"{KEY}.JSON", b"{}")),
    "a size below 0": lambda members: before(members, with_size(b"\xff" * 11 + b"\0")),
    "a size of 2**60": lambda members: before(
        members, with_size(b"\x80\0\0\0" + struct.pack(">q", 1 << 60))
    ),
    "a size below 0, extended": lambda members: before(
        members, extended(b"14 size=-1536\n") + info("README")
    ),
    "a size of 2**66, extended": lambda members: before(
        members, extended(b"29 size=73786976294838206464\n") + info("README")
    ),
    "no size, extended": lambda members: before(members, extended(b"10 size=x\n") + info("README")),
    "an extension longer than it is": lambda members: before(
        members, extended(b"99999 path=a.png\n") + info("README")
    ),
    "3,000 headers of long names": lambda members: before(
        members, info("././@LongLink", b"x" * 9, tarfile.GNUTYPE_LONGNAME) * 3000
    ),
    "noise for a header": lambda members: before(members, NOISE[:512]),
    "zeros for a header": lambda members: before(members, bytes(512)),
    "a second tar after its end": lambda members: archive(members) + archive(TWO),
    "noise after its end": lambda members: archive(members) + NOISE,
    "zeros to 1 MiB after two samples": lambda members: archive(members[:6], end=bytes(1 << 20)),
    "no end": lambda members: archive(members, end=b""),
    "half of its end": lambda members: archive(members, end=bytes(512)),
}
"""Tars that are reported as damaged: the sample `KEY`, or the whole tar."""

SOUND: Mapping[str, Callable[[Members], bytes]] = {
    "more of the end": lambda members: archive(members, end=bytes(10_240)),
    "extensions in capitals": lambda members: renamed(
        members, lambda name: name.replace(".jpg", ".JPG").replace(".json", ".Json")
    ),
    "images with the wrong extension": lambda members: renamed(
        members, lambda name: name.replace(".png", ".gif").replace(".webp", ".jpeg")
    ),
    "members in another order": lambda members: archive(
        members[::3] + members[1::3] + members[2::3]
    ),
    "hidden files and folders": lambda members: before(
        members,
        info(f"._{KEY}.jpg", NOISE) + info(f"__MACOSX/._{KEY}.jpg", NOISE)
        + info("a.b", kind=tarfile.DIRTYPE),
    ),
    "files of no sample": lambda members: before(members, info("README", b"text")),
    "absolute names": lambda members: before(
        members, b"".join(info(f"/etc/{name}", content) for name, content in TWO)
    ),
    "names that leave the folder": lambda members: before(
        members, b"".join(info(f"../../{name}", content) for name, content in TWO)
    ),
    "long Chinese names": lambda members: before(
        members, b"".join(info(f"{LONG}{name}", content) for name, content in TWO)
    ),
    "commands for names": lambda members: before(
        members, b"".join(info(f"pipe:touch {name}", content) for name, content in TWO)
    ),
    "a member that is no sample": lambda members: before(members, info("y.bin", NOISE)),
}  # fmt: skip
"""Of which all samples are read, and others may be."""


# Rows of tables, and what is no regular file.

ROWS: Mapping[str, Callable[[bytes, bytes], bytes]] = {
    "half of it": lambda line, _: line[: len(line) // 2],
    "an open quote": lambda line, _: line.replace(b"a ", b'"a ', 1),
    "a quote at its start": lambda line, _: b'"' + line,
    "zero bytes in its path": lambda line, name: line.replace(name, b"0\0" + name),
    "zero bytes in its caption": lambda line, _: line.replace(b"a ", b"a \0"),
    "another cell": lambda line, _: line + b'\t,"x"',
    "not UTF-8": lambda line, _: line.replace(b"a ", b"a \xe9"),
    "half a character": lambda line, _: line.replace(b"a ", b"a \\ud83d"),
    "no path": lambda line, name: line.replace(name, b""),
    "a device": lambda line, name: line.replace(name, b"/dev/zero"),
    "a folder": lambda line, name: line.replace(name, b"/dev"),
    "a path that leaves the folder": lambda line, name: line.replace(name, b"../../" + name),
    "a carriage return": lambda line, _: line.replace(b"a ", b"a\r"),
    "two rows": lambda line, _: line + b"\n" + line,
    "a caption of 30 MB": lambda line, _: line.replace(b"a ", b"a " * (15 << 20)),
    "70 MB": lambda line, _: line.replace(b"a ", b"a " * (35 << 20)),
}
"""What may stand for a row, by its line and the name of its image."""


def large(path: Path) -> None:
    path.touch()
    os.truncate(path, 4 << 30)


SPECIAL_FILES: Mapping[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "4 GiB of zeros": large,
}
