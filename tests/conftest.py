"""What every test shares: few threads, no test marked for hardware that is not there, fixtures.

`vlm` is imported in the fixtures: the hook below checks shapes in what is imported after it.
"""

import atexit
import gc
import os
import shutil
import tempfile
import zlib

# Two cores are shared by the test process, its children and the data workers.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing of the user's is read or written.
os.environ["VLM_CACHE"] = tempfile.mkdtemp(prefix="vlm-cache-")

from pathlib import Path

import jaxtyping
import pytest
import torch

from tests.support.commands import ROOT, TINY_QUICKSTART, run_vlm

atexit.register(shutil.rmtree, os.environ["VLM_CACHE"], ignore_errors=True)

# Only modules whose annotations have shapes: mypy checks the others, and beartype takes its time.
jaxtyping.install_import_hook(
    [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "vlm").rglob("*.py")
        if "from jaxtyping import" in path.read_text(encoding="utf-8")
    ],
    "beartype.beartype",
)


def pytest_configure() -> None:
    gc.disable()
    # The first call imports much; children would each pay for it.
    torch.testing.assert_close(torch.zeros(1), torch.zeros(1))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the long counts to those who ask for them, as `make soak` does."""
    asked = any("soak" in argument for argument in config.args)
    return None if asked or collection_path.name != "soak" else True


def pytest_collection_finish() -> None:
    # What was imported and collected lives to the end: no collection of garbage looks at it again.
    gc.freeze()
    gc.enable()
    gc.set_threshold(20_000)  # tests leave little garbage, and it is looked for less often


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpus = torch.cuda.device_count()
    for item in items:
        needed = 2 if item.get_closest_marker("multi_gpu") else 1
        if item.get_closest_marker("gpu") or item.get_closest_marker("multi_gpu"):
            item.add_marker(pytest.mark.skipif(gpus < needed, reason=f"needs {needed} GPUs"))


@pytest.fixture
def unchecked(monkeypatch):
    """Turn off the checks of annotations, which a user does not have: they answer first, and
    cost more than the calls of a test with very many texts.
    """
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="session")
def small_emoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder as the shipped one, with every image of a quarter of its concepts."""
    from tests.builders import open_split, write_split

    shipped = ROOT / "data" / "emoji"
    folder = tmp_path_factory.mktemp("data") / "emoji"
    shutil.copytree(shipped, folder, ignore=shutil.ignore_patterns("*.tar.gz", "manifest.json"))
    for split in ("train", "val", "test_style", "test_novel", "test_novel_style"):
        samples = [
            sample
            for sample in open_split(shipped, split)
            if zlib.crc32(sample.concept.encode()) % 4 == 0
        ]
        write_split(folder, samples, split=split, samples_per_shard=1000)
    return folder


@pytest.fixture(scope="session")
def quickstart(
    tmp_path_factory: pytest.TempPathFactory, small_emoji: Path
) -> tuple[Path, str, str]:
    """The folder of a tiny quickstart in place of an older one, and what it printed."""
    folder = tmp_path_factory.mktemp("workspace") / "runs" / "quickstart"
    folder.mkdir(parents=True)
    for name in ("config.yaml", "left over"):  # what is known as a run is replaced
        (folder / name).touch()
    out, err = run_vlm(
        "quickstart", "--out", folder, "--data.folder", small_emoji, *TINY_QUICKSTART
    )
    return folder, out, err


@pytest.fixture(scope="session")
def clip():
    """CLIP's own tokenizer, whose pattern of words takes a second to build."""
    from vlm.text.clip_bpe import clip_tokenizer

    return clip_tokenizer()


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """Return a folder whose split `test` shows 12 concepts twice, in two styles."""
    from tests.builders import make_samples, write_split

    return write_split(tmp_path_factory.mktemp("data"), make_samples(24), split="test")


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    from tests.builders import tiny_bundle

    return tiny_bundle(tmp_path_factory.mktemp("run") / "bundle", context_length=32)


@pytest.fixture(scope="session")
def embedder(bundle):
    from vlm.embedding.embedder import Embedder

    return Embedder.load(bundle, device="cpu")
