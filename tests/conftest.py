"""What every test shares: few threads, no test marked for hardware that is not there, fixtures.

`vlm` is imported in the fixtures: a conftest may be read before shapes are checked, and what is
imported before is not checked at all.
"""

import gc
import os

# Two cores are shared by the test process, its children and the data workers.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
import torch

from tests.support.commands import TINY_QUICKSTART, run_vlm


def pytest_configure() -> None:
    gc.disable()
    # The first call imports much; children would each pay for it.
    torch.testing.assert_close(torch.zeros(1), torch.zeros(1))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_finish() -> None:
    # What was imported and collected lives to the end: no collection of garbage looks at it again.
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpus = torch.cuda.device_count()
    for item in items:
        needed = 2 if item.get_closest_marker("multi_gpu") else 1
        if item.get_closest_marker("gpu") or item.get_closest_marker("multi_gpu"):
            item.add_marker(pytest.mark.skipif(gpus < needed, reason=f"needs {needed} GPUs"))


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The folder of a tiny quickstart and what it printed; run twice, as a user may."""
    folder = tmp_path_factory.mktemp("workspace") / "runs" / "quickstart"
    run_vlm("quickstart", "--out", folder, *TINY_QUICKSTART, "--seed", "1")
    (folder / "left over").touch()  # the second run replaces the first
    out, err = run_vlm("quickstart", "--out", folder, *TINY_QUICKSTART)
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
