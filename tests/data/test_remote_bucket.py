"""Sources in an object store are those of a folder: moto's server speaks S3's protocol."""

import shutil

import pytest

from tests.builders import THINGS, write_img2dataset
from tests.support.object_store import ObjectStore
from vlm.data.config import SourceConfig
from vlm.data.indexing import index_folder
from vlm.data.source import open_source
from vlm.errors import DataError

# The server takes seconds to start.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache")]
EN = [en for en, _ in THINGS]


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """A folder of tars, whose numbers have different widths."""
    folder = write_img2dataset(tmp_path_factory.mktemp("data") / "tars", EN, samples_per_shard=3)
    (folder / "00002.tar").rename(folder / "10.tar")
    return folder


@pytest.fixture(scope="module")
def store(tars):
    """Return a store with these tars, as they are under `loose`, and indexed under `indexed`."""
    indexed = tars.with_name("indexed")
    shutil.copytree(tars, indexed)
    index_folder(indexed)
    with ObjectStore() as store:
        store.put_folder(tars, "loose")
        store.put_folder(indexed, "indexed")
        yield store


def fields_of(path):
    source = open_source(SourceConfig(path=str(path)))
    return [(s.uid, s.image, s.captions, s.concept, s.source, s.licence, s.labels) for s in source]


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("indexed", "indexed"),
        ("indexed/", "indexed"),
        ("loose/*.tar", "tars/*.tar"),
        ("loose/{00000..00001}.tar", "tars/{00000..00001}.tar"),
        ("loose/10.tar", "tars/10.tar"),
    ],
)
def test_the_samples_of_a_bucket_are_those_of_the_disk(tars, url, path):
    assert fields_of(f"s3://pairs/{url}") == fields_of(tars.parent / path)


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("none", "s3://pairs/none/manifest.json is not there; expected a data folder, or tars by"),
        ("loose/*.csv", "s3://pairs/loose/*.csv: nothing is there"),
        ("loose/9.tar", "s3://pairs/loose/9.tar is not there"),
    ],
)
def test_what_a_bucket_lacks_is_named(path, said):
    with pytest.raises(DataError) as caught:
        fields_of(f"s3://pairs/{path}")
    assert str(caught.value).startswith(said)


def test_a_tar_that_has_changed_in_a_bucket_is_looked_through_again(store, tars):
    path, url = tars / "00000.tar", "s3://pairs/changing/0.tar"
    store.put("changing/0.tar", path.read_bytes())
    assert fields_of(url)[2][2] == {"en": ["small dog"]}
    store.put("changing/0.tar", path.read_bytes().replace(b"small dog", b"large dog"))
    assert fields_of(url)[2][2] == {"en": ["large dog"]}
