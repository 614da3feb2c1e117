"""WebDataset shards: written byte for byte alike, and verified against the manifest when opened."""

import gzip
import hashlib
import io
import json
import mmap
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import webdataset

from vlm.data.manifest import Manifest, ShardEntry, write_manifest
from vlm.data.records import check_end, languages_of, members_of, whole_characters
from vlm.data.sample import Sample
from vlm.errors import DataError
from vlm.files import sha256_of, write_file

_IMAGE_SIGNATURES = {"png": b"\x89PNG\r\n\x1a\n", "jpg": b"\xff\xd8\xff", "webp": b"RIFF"}
_IMAGE_EXTENSIONS = frozenset({"png", "jpg", "jpeg", "webp"})


@dataclass(frozen=True, slots=True)
class _Members:
    """Where the two members of one sample lie in the unpacked shard."""

    key: str
    image: tuple[int, int]
    record: tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """One verified shard; samples are read by their position in it."""

    path: Path
    _content: bytes | mmap.mmap
    _members: Sequence[_Members]

    def __len__(self) -> int:
        return len(self._members)

    @property
    def keys(self) -> list[str]:
        """The samples' keys, by position."""
        return [members.key for members in self._members]

    def __getitem__(self, position: int) -> Sample:
        """Return the sample at `position`; a `DataError` if its JSON record is not one of ours."""
        members = self._members[position]
        image = self._read(members.image)
        try:
            record = json.loads(self._read(members.record))
            sample = _sample_from_record(members.key, image, record)
        except (DataError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{self.path}: the record of {members.key!r} is not valid ({error}); "
                'expected JSON with "captions": {language: [text, ...]}'
            ) from error
        return replace(sample, address=f"{self.path}#{position}")

    def _read(self, span: tuple[int, int]) -> bytes:
        start, size = span
        return bytes(self._content[start : start + size])


def open_shard(folder: Path, entry: ShardEntry) -> Shard:
    """Open a shard and check it against its manifest entry.

    Plain `.tar` files are mapped into memory; `.tar.gz` files are unpacked into it.

    Raises:
        DataError: the file is missing, or its bytes, hash or sample count differ.
    """
    path = entry.path_in(folder)
    entry.verify(path)
    shard = index_shard(path)
    if len(shard) != entry.samples:
        raise DataError(
            f"shard {path} holds {len(shard)} samples, the manifest says {entry.samples}"
        )
    return shard


def describe_shard(shard: Shard) -> ShardEntry:
    """Return the manifest entry of a shard as it is now."""
    size, digest = shard.path.stat().st_size, sha256_of(shard.path)
    return ShardEntry(name=shard.path.name, samples=len(shard), bytes=size, sha256=digest)


def check_keys(shards: Iterable[Shard]) -> None:
    """Refuse, by a `DataError`, a split with a key twice: its samples would count as one."""
    seen: dict[str, Path] = {}
    for shard in shards:
        for key in shard.keys:
            if key in seen:
                raise DataError(
                    f"the key {key!r} is in {seen[key]} and in {shard.path}; expected every key of "
                    "a split once, for example with the shard's name in front: 00001/00000"
                )
            seen[key] = shard.path


def index_folder(folder: Path) -> Manifest:
    """Write the manifest of the shards in a folder and return it.

    The split of a shard is the part of its name before the last dash: `train-00000.tar`.

    Raises:
        DataError: there is no such folder, no shard in it, or a shard cannot be read.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; expected one with WebDataset shards")
    splits: dict[str, list[Shard]] = {}
    for path in sorted([*folder.glob("*.tar"), *folder.glob("*.tar.gz")]):
        split, dash, _ = path.name.rpartition("-")
        if not dash:
            raise DataError(f"{path} belongs to no split; expected a name like train-00000.tar")
        if path.with_name(f"{path.name}.gz").exists():
            raise DataError(f"found both {path} and {path.name}.gz; expected one of the two")
        splits.setdefault(split, []).append(index_shard(path))
    if not splits:
        raise DataError(f"{folder} holds no shard; expected files like train-00000.tar")
    for shards in splits.values():
        check_keys(shards)
        for shard in filter(len, shards):
            shard[0]  # shards of another project, which hold no captions, show it here
    manifest = Manifest(
        splits={split: tuple(map(describe_shard, shards)) for split, shards in splits.items()}
    )
    write_manifest(folder, manifest)
    return manifest


def write_shards(
    samples: Iterable[Sample], folder: Path, *, split: str, samples_per_shard: int
) -> tuple[ShardEntry, ...]:
    """Write samples as `SPLIT-00000.tar.gz`, ... and return their manifest entries.

    The bytes depend on the samples alone: members carry no time, owner or machine.

    Raises:
        DataError: a uid has a dot in its last part or occurs twice, or an image is of no known
            format.
    """
    if samples_per_shard < 1:
        raise DataError(f"samples_per_shard is {samples_per_shard}; expected at least 1")
    entries: list[ShardEntry] = []
    remaining = _check_uids(samples)
    while chunk := list(islice(remaining, samples_per_shard)):
        name = f"{split}-{len(entries):05d}.tar.gz"
        content = _pack(chunk)
        write_file(folder / name, content)
        digest = hashlib.sha256(content).hexdigest()
        entries.append(ShardEntry(name=name, samples=len(chunk), bytes=len(content), sha256=digest))
    return tuple(entries)


def _check_uids(samples: Iterable[Sample]) -> Iterator[Sample]:
    """Pass samples on whose uids can be keys: WebDataset cuts a key at the first dot of a name."""
    seen = set()
    for sample in samples:
        if "." in sample.uid.rsplit("/", 1)[-1] or sample.uid in seen:
            raise DataError(f"the uid {sample.uid!r} has a dot in its name or occurs twice")
        seen.add(sample.uid)
        yield sample


def _pack(samples: Iterable[Sample]) -> bytes:
    buffer = io.BytesIO()
    writer = webdataset.TarWriter(
        buffer, encoder=False, mtime=0, user="", group="", mode=0o644, compress=False
    )
    for sample in samples:
        record = {
            "captions": {language: list(texts) for language, texts in sample.captions.items()},
            "concept": sample.concept,
            "source": sample.source,
            "licence": sample.licence,
            "labels": dict(sample.labels),
        }
        text = json.dumps(record, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        kinds = [kind for kind, mark in _IMAGE_SIGNATURES.items() if sample.image.startswith(mark)]
        if not kinds:
            raise DataError(f"the image of {sample.uid!r} is neither PNG, JPEG nor WebP")
        writer.write({"__key__": sample.uid, kinds[0]: sample.image, "json": text.encode()})
    writer.close()
    return gzip.compress(buffer.getvalue(), compresslevel=9, mtime=0)


def _sample_from_record(key: str, image: bytes, record: Mapping[str, object]) -> Sample:
    if "captions" not in record:
        raise ValueError(f"it has no captions, only {', '.join(record)}")
    labels, concept = record.get("labels", {}), record.get("concept")
    if not isinstance(labels, dict) or not all(isinstance(v, str) for v in labels.values()):
        raise ValueError("labels is no mapping to texts")
    return Sample(
        uid=key,
        image=image,
        captions=_captions_from_record(record["captions"]),
        concept=whole_characters(str(key if concept in (None, "") else concept), "concept"),
        source=str(record.get("source", "")),
        licence=str(record.get("licence", "")),
        labels=labels,
    )


def _captions_from_record(record: object) -> dict[str, list[str]]:
    """Check the captions of a record; empty ones count as missing."""
    if not isinstance(record, dict):
        raise ValueError("captions is no mapping by language")
    captions = {}
    for language, value in record.items():
        texts = [value] if isinstance(value, str) else (value or [])
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"the captions in {language!r} are no texts")
        if kept := [whole_characters(text, language) for text in texts if text.strip()]:
            captions[language] = kept
    if not captions:
        raise ValueError("there is no caption")
    merged: dict[str, list[str]] = {}
    for tag, language in languages_of(captions).items():
        merged.setdefault(language, []).extend(captions[tag])
    return merged


def index_shard(path: Path) -> Shard:
    """Find where every sample's members lie in a `.tar` or `.tar.gz` file.

    Raises:
        DataError: the tar cannot be read to its end, or a sample lacks its image or record.
    """
    spans: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        content = _unpacked(path)
        file = io.BytesIO(content) if isinstance(content, bytes) else content
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for key, extension, member in members_of(archive, path):
                if extension in spans.setdefault(key, {}):
                    raise tarfile.ReadError(f"{key}.{extension} occurs twice")
                spans[key][extension] = member.start, member.size
            check_end(archive)
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"shard {path} cannot be read: {error}") from error
    members = []
    for key, parts in spans.items():
        images = [span for extension, span in parts.items() if extension in _IMAGE_EXTENSIONS]
        if len(images) != 1 or "json" not in parts:
            found = ", ".join(sorted(parts))
            raise DataError(f"shard {path}: {key!r} needs one image and one .json, has {found}")
        members.append(_Members(key=key, image=images[0], record=parts["json"]))
    return Shard(path, content, members)


def _unpacked(path: Path) -> bytes | mmap.mmap:
    """Return a shard's bytes; those of a plain tar are not read before they are looked at."""
    if path.name.endswith(".gz"):
        return gzip.decompress(path.read_bytes())
    with path.open("rb") as file:
        empty = path.stat().st_size == 0  # an empty file cannot be mapped
        return b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
