"""A source of any kind asks what the same data asks as a benchmark's files, here and at a URL."""

import gzip
import json
import shutil
from concurrent.futures import ProcessPoolExecutor

import pyarrow
import pyarrow.parquet
import pytest

from tests.builders import THINGS, encoded, make_image, make_samples, write_img2dataset, write_split
from tests.evaluation.retrieval.benchmarks.opened import opened
from tests.support.processes import PROCESSES
from tests.support.web_server import WebServer
from vlm.errors import ConfigError, DataError
from vlm.evaluation.config import RetrievalSource
from vlm.evaluation.retrieval.pairs import questions_of
from vlm.evaluation.retrieval.sources import open_source, sources_of

EN = [en for en, _ in THINGS]
ZH = [zh for _, zh in THINGS]


def asked(pairs):
    """Return by language the fingerprint, which is a hash of texts, correct pairs and images."""
    return {language: found.fingerprint for language, found in questions_of(pairs).items()}


def write_table(path, rows):
    path.write_text("\n".join(["image,caption_en,caption_zh", *rows]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    """Serve the same images and captions as a table, tars, a Parquet file and a data folder."""
    folder = tmp_path_factory.mktemp("served") / "web"
    write_img2dataset(folder / "tars", EN, samples_per_shard=5)
    write_split(folder / "data", make_samples(24), split="test_style")
    (folder / "images").mkdir()
    images = [encoded(make_image(number)) for number in range(12)]
    for number, (image, en, zh) in enumerate(zip(images, EN, ZH, strict=True)):
        (folder / f"images/{number:02d}.png").write_bytes(image)
        (folder / f"images/{number:02d}.txt").write_text(f"{en}\n{zh}\n", encoding="utf-8")
    # A row for each of the captions: rows of one image are one image.
    rows = [f"images/{n:02d}.png,{en} {turn},{zh}" for turn in (1, 2)
            for n, (en, zh) in enumerate(THINGS)]  # fmt: skip
    write_table(folder / "mine.csv", rows)
    (folder / "mine.csv.gz").write_bytes(gzip.compress((folder / "mine.csv").read_bytes()))
    table = pyarrow.table({"image": images, "caption_en": EN, "caption_zh": ZH})
    pyarrow.parquet.write_table(table, folder / "held.parquet")
    with WebServer(folder) as server:
        yield server


def test_a_table_asks_the_same_by_its_own_reader_packed_and_at_a_url(web):
    table = opened(web.folder / "mine.csv")
    assert (table.kind, len(table.images), len(table.texts["en"].texts)) == ("table", 12, 24)
    for path, settings in (
        (web.folder / "mine.csv", {"kind": "source"}),
        (web.folder / "mine.csv.gz", {}),
        (web.url("mine.csv"), {"images": web.folder}),
    ):
        found = opened(path, **settings)
        assert asked(found) == asked(table)
        assert found.translations["en", "zh"].tolist() == table.translations["en", "zh"].tolist()


def test_tars_ask_the_same_by_their_own_reader_by_a_pattern_and_at_a_url(web):
    tars = opened(web.folder / "tars")
    assert (tars.kind, tars.texts["en"].texts) == ("webdataset", EN)
    for path in ("tars/*.tar", "tars/{00000..00002}.tar"):
        assert asked(opened(web.folder / path)) == asked(tars)
    assert asked(opened(web.url("tars/{00000..00002}.tar"))) == asked(tars)


def test_images_in_a_table_or_next_to_their_captions_ask_the_same(web):
    held = opened(web.folder / "held.parquet")
    assert {language: list(own.texts) for language, own in held.texts.items()} == {
        "en": EN, "zh": ZH,
    }  # fmt: skip
    assert [[text, image] for text, image in held.texts["zh"].matches.tolist()] == [
        [number, number] for number in range(12)
    ]
    assert asked(opened(web.url("held.parquet"))) == asked(held)
    assert asked(opened(web.folder / "images")) == asked(held)
    assert held.addresses[0] == f"{web.folder / 'held.parquet'}#held.parquet#0"


def test_a_manifest_decides_that_concepts_are_asked_here_and_at_a_url(web, tmp_path):
    def of(path):
        return open_source(*sources_of([str(path)]), languages=["zh", "en"])

    here, there = of(web.folder / "data"), of(web.url("data"))
    assert here.kind == there.kind == "data folder"
    assert (len(here.images), len(here.texts["zh"].texts)) == (24, 12)
    assert asked(here) == asked(there)
    bare = shutil.copytree(web.folder / "data", tmp_path / "bare")
    (bare / "manifest.json").unlink()
    found = opened(f"{bare}/*.tar.gz")
    assert (found.kind, len(found.texts["zh"].texts)) == ("source", 48)


def test_its_images_can_be_sent_to_other_processes(web):
    images = opened(web.url("held.parquet")).images
    with ProcessPoolExecutor(1, PROCESSES) as executor:
        assert executor.submit(list, images).result(timeout=60) == list(images)
    assert images[3:5] == [encoded(make_image(3)), encoded(make_image(4))]


def test_conditions_fields_and_languages_are_those_of_a_source(web):
    some = opened(web.folder / "images", where=["concept=03.png"], languages=["zh"])
    assert {language: list(own.texts) for language, own in some.texts.items()} == {"zh": [ZH[3]]}
    swapped = opened(
        web.url("held.parquet"), captions={"fr": ("caption_en",)}, language_of=("caption_zh",)
    )
    assert {language: list(own.texts) for language, own in swapped.texts.items()} == {
        "fr": EN, "zh": ZH,
    }  # fmt: skip


def test_what_cannot_be_used_is_counted_up_to_the_allowed_share(web, tmp_path):
    rows = [f"{n:02d}.png,{en},{zh}" for n, (en, zh) in enumerate(THINGS)]
    path = write_table(tmp_path / "some.csv", [*rows, "03.png,,", "gone.png,a ghost,鬼"])
    settings = {"kind": "source", "images": web.folder / "images"}
    with pytest.raises(DataError, match=r"2 of 14 samples cannot be used \(first: .*, line 14: fo"):
        opened(path, **settings)
    found = opened(path, allowed_share=0.2, **settings)
    assert found.findings["unusable_samples"] == 2
    assert (len(found.images), len(found.texts["en"].texts)) == (12, 12)


def test_captions_of_no_recognised_language_are_counted_and_not_asked(tmp_path):
    for number, text in enumerate(["a cat", "猫がいる", "红苹果"]):
        (tmp_path / f"{number}.png").write_bytes(encoded(make_image(number)))
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    found = opened(tmp_path)
    assert list(found.texts) == ["en", "zh"]
    assert found.findings["notes"] == ("1 captions in a language that was not recognised",)
    assert found.findings["images_without_caption"] == 1
    named = opened(tmp_path, captions={"ja": ("txt",)})
    assert {language: len(own.texts) for language, own in named.texts.items()} == {"ja": 3}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("s3://bucket/tars/*.tar", "tars"),
        ("https://host/tars/{0..3}.tar?signature=secret", "tars"),
        ("https://host/mine.csv?signature=secret", "mine"),
        ("mine=s3://bucket/tars/*.tar", "mine"),
    ],
)
def test_a_source_at_a_url_has_a_name_without_a_request(path, name):
    (source,) = sources_of([path])
    assert source.name == name
    assert "secret" not in json.dumps(source.as_record())


@pytest.mark.parametrize(
    ("path", "settings", "error", "said"),
    [
        ("images", {"split": "val"}, DataError, r"images has no splits; found the split 'val'$"),
        ("images", {"images": "."}, ConfigError, r"is no table \(images\); found images, which"),
        ("images", {"language": "ja"}, DataError, r"names the languages of all its captions"),
        ("images", {"languages": ["fr"]}, DataError, r"has captions in en, zh; expected fr as"),
        ("tars/*.zip", {}, DataError, r"tars/\*\.zip: nothing is there"),
        ("tars/{0..2.tar", {}, DataError, r"unbalanced braces"),
        ("tars/*.tar", {"split": "val"}, DataError, r"has no splits; found the split 'val'$"),
        ("held.parquet", {"captions": {"en": ("none",)}}, DataError, r"has no column 'none'"),
        ("held.parquet", {"split": "val"}, DataError, r"has no split 'val'; it has no splits$"),
    ],
)  # fmt: skip
def test_what_does_not_fit_a_source_is_said(web, path, settings, error, said):
    with pytest.raises(error, match=said):
        opened(web.folder / path, **settings)


def test_settings_of_a_source_are_refused_for_a_benchmark_and_say_how_it_can_be_one(web):
    source = RetrievalSource(path=str(web.folder / "mine.csv"), captions={"en": ("caption_zh",)})
    with pytest.raises(ConfigError, match=r"found captions, which is for .*`kind: source` in a"):
        open_source(source, languages=["en"])
    with pytest.raises(ConfigError, match=r"is at a URL; found the kind table, which is read from"):
        opened(web.url("mine.csv"), kind="table")
