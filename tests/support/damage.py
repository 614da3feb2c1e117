"""Small sources of every kind, and seeded damage to their files.

What no reader can see is not injected: a table of text that is cut between two rows is a whole,
shorter one, and so is a tar of zeros after a sample, up to the length of a tar's end. What can only
be seen as other letters or another image is injected, and said in `free` and `changed`.
"""

import gzip
import io
import json
import random
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet

from tests.builders import THINGS, encoded, make_image, make_sample, write_tar
from tests.support import hostile
from tests.support.hostile import KEY, NOISE, replaced
from vlm.data.indexing import index_folder
from vlm.data.manifest import Manifest, write_manifest
from vlm.data.shards import write_shards

NUMBER = 12
PER_SHARD = 4
ALL = frozenset(range(NUMBER))

Content = bytes | Callable[[Path], object] | None
"""The bytes of a file, or what makes it; None is no file."""


@dataclass(frozen=True, kw_only=True)
class Store:
    """The files of an undamaged source of 12 samples."""

    name: str
    path: str
    """What the source names, from the folder of the files."""
    files: Mapping[str, bytes]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A store as an injection leaves it."""

    kind: str
    what: str
    store: Store
    files: Mapping[str, Content]
    """Those that are not what they were."""
    changed: frozenset[int] = frozenset()
    """Samples whose image may be another one without a word: nothing has a hash of it."""
    free: frozenset[int] = frozenset()
    """Samples whose text was changed: the result is valid text, so any is accepted."""
    adds: bool = False
    """Whether samples may be there that were not."""

    def __str__(self) -> str:
        return f"{self.store.name}: {self.kind}, {self.what}"

    def write(self, folder: Path) -> Path:
        """Write all files; return the path of the source."""
        for name, content in {**self.store.files, **self.files}.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if callable(content):
                content(path)
            elif content is not None:
                path.write_bytes(content)
        return folder / self.store.path


# Sources.


def image_of(number: int) -> bytes:
    options = ({}, {"quality": 90}, {"lossless": True})[number % 3]
    return encoded(make_image(number), ("PNG", "JPEG", "WEBP")[number % 3], **options)


def name_of(number: int) -> str:
    return f"{number:09d}.{('png', 'jpg', 'webp')[number % 3]}"


def stores(folder: Path) -> dict[str, Store]:
    """Return a source of every kind by its name; some are written to the folder and read back."""
    samples = [make_sample(number, image=image_of(number)) for number in range(NUMBER)]
    packed, plain, loose = folder / "packed", folder / "plain", folder / "loose"
    entries = write_shards(samples, packed, split="train", samples_per_shard=PER_SHARD)
    write_manifest(packed, Manifest(splits={"train": entries}))
    plain.mkdir()
    for path in packed.glob("*.tar.gz"):
        (plain / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    index_folder(plain)
    for shard in range(NUMBER // PER_SHARD):
        write_tar(loose / f"{shard:05d}.tar", members_of(shard))
    tars = files_below(loose)
    packed_tars = {f"{name}.gz": gzip.compress(tar) for name, tar in tars.items()}
    found = {
        "packed data folder": ("", files_below(packed)),
        "plain data folder": ("", files_below(plain)),
        "tars": ("", tars),
        "packed tars": ("", packed_tars),
        "images": ("", folder_of_images()),
        **tables(),
    }
    return {name: Store(name=name, path=path, files=files) for name, (path, files) in found.items()}


def files_below(folder: Path) -> dict[str, bytes]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def members_of(shard: int) -> list[tuple[str, bytes]]:
    members = []
    for number in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
        en, key = THINGS[number][0], f"{number:09d}"
        record = {"caption": en, "key": key, "status": "success"}
        members += [
            (name_of(number), image_of(number)),
            (f"{key}.txt", en.encode()),
            (f"{key}.json", json.dumps(record).encode()),
        ]
    return members


def folder_of_images() -> dict[str, bytes]:
    files = {}
    for number, (en, zh) in enumerate(THINGS):
        files[name_of(number)] = image_of(number)
        record = json.dumps({"captions": {"en": [en], "zh": [zh]}}).encode()
        suffix, content = ("json", record) if number % 2 else ("txt", zh.encode())
        files[f"{number:09d}.{suffix}"] = content
    return files


def tables() -> dict[str, tuple[str, dict[str, bytes]]]:
    images = {name_of(number): image_of(number) for number in range(NUMBER)}
    rows = [(name_of(number), zh, f"a {en}") for number, (en, zh) in enumerate(THINGS)]
    head = ("image", "caption_zh", "caption_en")
    quoted = [",".join(f'"{cell}"' for cell in row) for row in (head, *rows)]
    objects = [json.dumps(dict(zip(head, row, strict=True))) for row in rows]
    texts = {
        "t.csv": quoted,
        "t.tsv": ["\t".join(row) for row in (head, *rows)],
        "pairs.csv": ["image,caption", *(f"{name},{en}, or so" for name, _, en in rows)],
        "t.jsonl": objects,
    }
    contents = {name: "".join(f"{line}\n" for line in of).encode() for name, of in texts.items()}
    contents |= {f"{name}.gz": gzip.compress(contents[name]) for name in ("t.csv", "t.jsonl")}
    columns = {name: [row[place] for row in rows] for place, name in enumerate(head)}
    contents |= {
        f"{name}.parquet": parquet(columns, write_page_checksum=name == "paths", row_group_size=5)
        for name in ("paths", "unchecked")
    }
    found = {name: (name, {name: content, **images}) for name, content in contents.items()}
    columns["image"] = list(images.values())
    content = parquet(columns, write_page_checksum=True, row_group_size=5)
    return found | {"images.parquet": ("images.parquet", {"images.parquet": content})}


def parquet(columns: Mapping[str, list], **options: object) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer, **options)
    return buffer.getvalue()


# Injections of chance.


class Injections:
    """Makes cases; a function of the seed."""

    def __init__(self, stores: Mapping[str, Store], seed: int) -> None:
        self.stores = stores
        self.rng = random.Random(seed)

    def flip(
        self, kind: str, store: str, name: str, places: Sequence[int], **allowed: frozenset[int]
    ) -> Case:
        """Change one byte at one of some places, most often one bit of it."""
        content = bytearray(self.stores[store].files[name])
        place = self.rng.choice(places)
        content[place] ^= self.rng.choice([1 << self.rng.randrange(8), self.rng.randrange(1, 256)])
        return self.case(kind, store, name, bytes(content), f"byte {place} of {name}", **allowed)

    def cut(self, kind: str, store: str, name: str) -> Case:
        content = self.stores[store].files[name]
        length = self.rng.randrange(len(content))
        if name.endswith(".tar") and self.rng.random() < 0.5:
            length -= length % 512
        what = f"{length} of {len(content)} bytes of {name}"
        return self.case(kind, store, name, content[:length], what)

    def case(
        self, kind: str, store: str, name: str, content: Content, what: str, **allowed: object
    ) -> Case:
        return Case(
            kind=kind, what=what, store=self.stores[store], files={name: content}, **allowed
        )

    def names(self, store: str, suffix: str) -> list[str]:
        return [name for name in self.stores[store].files if name.endswith(suffix)]

    def all(self) -> Iterator[Case]:
        yield from self.of_tars("tars", each=8, hashed=False)
        yield from self.of_tars("plain data folder", each=3, hashed=True)
        yield from self.of_packed("packed tars", ".tar.gz", 24)
        yield from self.of_packed("packed data folder", ".tar.gz", 16)
        yield from self.of_packed("t.csv.gz", ".csv.gz", 10)
        yield from self.of_packed("t.jsonl.gz", ".jsonl.gz", 10)
        yield from self.of_manifests()
        yield from self.of_indexes()
        yield from self.of_texts()
        yield from self.of_parquet()
        yield from self.of_image_files()
        yield from self.hostile()

    def of_tars(self, store: str, *, each: int, hashed: bool) -> Iterator[Case]:
        fields = {
            "name": (0, 14), "mode": (100, 108), "size": (124, 136), "checksum": (148, 156),
            "type": (156, 157), "rest": (157, 512),
        }  # fmt: skip
        for name in self.names(store, ".tar"):
            content = self.stores[store].files[name]
            with tarfile.open(fileobj=io.BytesIO(content)) as tar:
                members = tar.getmembers()
            for field, (start, end) in fields.items():
                for member in self.rng.choices(members, k=-(-each // 3)):
                    places = range(member.offset + start, member.offset + end)
                    yield self.flip(f"flips in a header's {field}", store, name, places)
            for _ in range(each):
                yield self.cut("truncated", store, name)
                member = self.rng.choice(members)
                number = int(member.name.partition(".")[0].removeprefix("sample-"))
                allowed = {}
                if not hashed:
                    image = not member.name.endswith((".txt", ".json"))
                    allowed["changed" if image else "free"] = frozenset({number})
                data = range(member.offset_data, member.offset_data + member.size)
                yield self.flip("flips in members", store, name, data, **allowed)
                what = f"bytes of {member.name}"
                blank = content[: data.start] + bytes(member.size) + content[data.stop :]
                yield self.case("members of zeros", store, name, blank, what, **allowed)
                blank = content[: member.offset] + bytes(512) + content[data.start :]
                yield self.case("headers of zeros", store, name, blank, what)
            yield self.case("no bytes", store, name, b"", name)
            yield self.case("noise", store, name, NOISE * 9, name)

    def of_packed(self, store: str, suffix: str, number: int) -> Iterator[Case]:
        names = self.names(store, suffix)
        for place in range(number):
            name = names[place % len(names)]
            size = len(self.stores[store].files[name])
            yield self.flip("flips in packed files", store, name, range(size))
            if place % 2:
                yield self.cut("truncated, packed", store, name)
        content = self.stores[store].files[names[0]]
        for what, damaged in {
            "no bytes": b"",
            "noise": NOISE,
            "noise after": content + NOISE,
        }.items():
            yield self.case("packed files of other bytes", store, names[0], damaged, what)
        bomb = gzip.compress(bytes(40 << 20)) * 10
        for what, damaged in {"alone": bomb, "after": content + bomb}.items():
            yield self.case("packed files of 400 MB of zeros", store, names[0], damaged, what)

    def of_manifests(self) -> Iterator[Case]:
        for store in ("packed data folder", "plain data folder"):
            size = len(self.stores[store].files["manifest.json"])
            for _ in range(24):
                yield self.flip("flips in a manifest", store, "manifest.json", range(size))
            for _ in range(4):
                yield self.cut("truncated manifests", store, "manifest.json")
        shards = self.names(store, ".tar")
        for missing in shards:
            yield self.case("missing shards", store, missing, None, missing)
        swapped = {
            name: self.stores[store].files[other]
            for name, other in zip(shards, reversed(shards), strict=True)
        }
        yield Case(kind="swapped shards", what="", store=self.stores[store], files=swapped)

    def of_indexes(self) -> Iterator[Case]:
        store = "plain data folder"
        names = self.names(store, ".arrow")
        for place in range(60):
            name = names[place % len(names)]
            size = len(self.stores[store].files[name])
            places = (range(size), range(400), range(size - 600, size))[place // 3 % 3]
            yield self.flip("flips in an index", store, name, places)
            if place % 4 == 0:
                yield self.cut("truncated indexes", store, name)
        for what, content in {"no bytes": b"", "noise": NOISE}.items():
            yield self.case("indexes of other bytes", store, names[0], content, what)
        other = self.stores[store].files[names[1]]
        yield self.case("swapped indexes", store, names[0], other, names[0])

    def of_texts(self) -> Iterator[Case]:
        for name in ("t.csv", "t.tsv", "pairs.csv", "t.jsonl"):
            content = self.stores[name].files[name]
            head = name != "t.jsonl"
            for place in self.rng.sample(range(len(content)), 20):
                line = content.count(b"\n", 0, place) - head
                ends = content[place : place + 1] == b"\n"
                free = ALL if line < 0 else frozenset({line, line + 1} if ends else {line})
                yield self.flip("flips in a text table", name, name, [place], free=free, adds=True)
        for _ in range(8):
            content = self.stores["t.jsonl"].files["t.jsonl"]
            place = self.rng.choice(
                [i for i in range(9, len(content)) if content[i - 2] not in b"}\n"]
            )
            yield self.case(
                "truncated, text", "t.jsonl", "t.jsonl", content[: place - 1], f"{place}"
            )
            content = self.stores["t.csv"].files["t.csv"]
            place = content.index(b"a ", self.rng.randrange(len(content) - 30)) + 1
            yield self.case("truncated, text", "t.csv", "t.csv", content[:place], f"{place}")

    def of_parquet(self) -> Iterator[Case]:
        for name in ("paths", "unchecked", "images"):
            store = f"{name}.parquet"
            content = self.stores[store].files[store]
            size = len(content)
            footer = size - 8 - int.from_bytes(content[-8:-4], "little")
            # Without checksums a page may hold any values.
            allowed = {"free": ALL} if name == "unchecked" else {}
            for _ in range(24):
                yield self.flip("flips in Parquet pages", store, store, range(footer), **allowed)
                yield self.flip("flips in a Parquet footer", store, store, range(footer, size))
            for _ in range(6):
                yield self.cut("truncated Parquet", store, store)

    def of_image_files(self) -> Iterator[Case]:
        for store in ("images", "t.tsv"):
            for number in (*range(NUMBER), *range(NUMBER)):
                name = name_of(number)
                size, of = len(self.stores[store].files[name]), frozenset({number})
                yield self.flip("flips in image files", store, name, range(size), changed=of)
            for number in range(NUMBER):
                case = self.cut("truncated image files", store, name_of(number))
                yield Case(**{**vars(case), "changed": frozenset({number})})

    def hostile(self) -> Iterator[Case]:
        """Give what `hostile` has, each where a source may have it."""
        fifth = frozenset({5})
        tar, members = "00001.tar", members_of(1)
        for what, image in hostile.IMAGES.items():
            content = image()
            yield self.case("images", "images", name_of(5), content, what, changed=fifth)
            if len(content) < 1 << 20:
                inside = replaced(members, "image", content)
                yield self.case("images in tars", "tars", tar, inside, what, changed=fifth)
        for what, record in hostile.RECORDS.items():
            yield self.case("records", "images", f"{KEY}.json", record, what, free=fifth)
            inside = replaced(members, "json", record)
            yield self.case("records in tars", "tars", tar, inside, what, free=fifth)
        for what, make in hostile.DAMAGED.items():
            yield self.case("damaged tars", "tars", tar, make(members), what)
        for what, make in hostile.SOUND.items():
            yield self.case("strange tars", "tars", tar, make(members), what, adds=True)
        for what, put in hostile.SPECIAL_FILES.items():
            yield self.case("special files", "t.tsv", name_of(5), put, what)
            # A walk over images takes no folders, pipes and devices; it counts them.
            if what not in ("a pipe", "a folder", "a link to a device"):
                yield self.case("special files", "images", name_of(5), put, what)
            yield self.case("special files", "images", f"{KEY}.json", put, f"{what}, record")
        yield from self.hostile_tables()

    def hostile_tables(self) -> Iterator[Case]:
        row = name_of(5).encode()
        for name in ("t.csv", "t.tsv", "pairs.csv", "t.jsonl"):
            content = self.stores[name].files[name]
            line = next(line for line in content.split(b"\n") if row in line)
            for what, make in hostile.ROWS.items():
                if "MB" in what and name not in ("t.csv", "t.jsonl"):
                    continue

                def put(path: Path, make=make, table=content, line=line) -> None:
                    path.write_bytes(table.replace(line, make(line, row)))

                free = frozenset({5})
                yield self.case("rows", name, name, put, what, free=free, adds=True)
            for what, table in {
                "no bytes": b"", "zeros": bytes(5000), "noise": NOISE,
                "a byte order mark": b"\xef\xbb\xbf" + content,
                "carriage returns": content.replace(b"\n", b"\r\n"),
                "no line feeds": content.replace(b"\n", b"\r"),
                "UTF-16": content.decode().encode("utf-16"),
            }.items():  # fmt: skip
                yield self.case("tables", name, name, table, what)
