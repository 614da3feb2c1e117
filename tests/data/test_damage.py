"""No damage to files loses a sample in silence, or gives one the data of another."""

import hashlib
import multiprocessing
import resource
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from tests.support.damage import NUMBER, Case, Injections, Store, stores
from vlm.batches.batch import SkippedSample
from vlm.batches.config import CaptionConfig
from vlm.batches.examples import TrainingExamples
from vlm.batches.order import SourceOrder
from vlm.data.config import SourceConfig
from vlm.data.source import open_source
from vlm.errors import DataError, VlmError
from vlm.images.config import AugmentationConfig, PreprocessConfig
from vlm.images.transforms import TrainingTransform

MEMORY = 300 << 20  # bytes that reading a small damaged source may take
PATIENCE = 30  # seconds
# No change is drawn by chance, so that an image is the same whatever its sample is called.
STILL = AugmentationConfig(crop_area=(1.0, 1.0), crop_ratio=(1.0, 1.0))
TRANSFORM = TrainingTransform(PreprocessConfig(), STILL, 16)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:UserWarning"),  # Pillow's, on odd EXIF
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),  # Python's, on forks with threads
]


class Reading(NamedTuple):
    """What came for one place of an epoch."""

    uid: str
    concept: int
    """The id of its concept, unique to the sample."""
    captions: Mapping[str, str]
    image: str
    """The hash of what training would see; empty if nothing came."""
    skipped: Sequence[SkippedSample]
    """What it came in the place of; with its own address first where nothing came."""


class Original(NamedTuple):
    """A sample of an undamaged store."""

    reading: Reading
    address: str
    """From the folder of the store: the file of its image, or `SHARD#ROW`."""
    row: str
    """Its row in the file that is the store; empty where that is a folder."""


class Outcome(NamedTuple):
    """What reading a damaged store gave."""

    found: list[Reading] | str
    """The readings of an epoch, or an error of opening."""
    fault: str
    """An error that is no `VlmError`; empty without one."""
    memory: int
    """Bytes more than before, at the most."""


# Reading.


def read(path: Path, first: int = 0) -> list[Reading]:
    """Read an epoch, from a place on, as a training run does."""
    source = open_source(SourceConfig(path=str(path)))
    order = SourceOrder("data", np.array(source.sizes))
    examples = TrainingExamples([source], [order], TRANSFORM, CaptionConfig(main_ratio=1.0), seed=0)
    readings = []
    for key in order.read(0, 0, first, max(order.size - first, 0)):
        try:
            example = examples[key]
        except DataError as error:  # nothing in its block can be used
            skipped = (SkippedSample("", source.address(key.shard, key.row), str(error)),)
            readings.append(Reading("", 0, {}, "", skipped))
        else:
            image = hashlib.sha256(example.image.numpy()).hexdigest()
            readings.append(
                Reading(example.uid, example.image_id, example.captions, image, example.skipped)
            )
    return readings


def status(field: str) -> int:
    """Return a number of bytes of this process, as Linux gives it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def outcome_of(path: Path, first: int) -> Outcome:
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins anew
    before = status("VmRSS")
    found: list[Reading] | str = []
    fault = ""
    try:
        found = read(path, first)
    except VlmError as error:
        found = str(error)
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    return Outcome(found, fault, status("VmHWM") - before)


def work(paths: Sequence[Path], first: int, connection: Connection) -> None:
    """Read sources; what asks for much more memory than it may have is a fault, and ends none."""
    most = status("VmSize") + 4 * MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for path in paths:
        connection.send(outcome_of(path, first))


def outcomes(paths: Sequence[Path], first: int = 0) -> Iterator[Outcome]:
    """Read sources in a child; if one crashes or hangs it, another goes on."""
    context = multiprocessing.get_context("fork")
    while paths:
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=work, args=(paths, first, theirs))
        child.start()
        theirs.close()
        try:
            while paths:
                fault = "" if ours.poll(PATIENCE) else f"it hangs for {PATIENCE} s"
                outcome = Outcome([], fault, 0) if fault else ours.recv()
                paths = paths[1:]
                yield outcome
                if fault:
                    break
        except EOFError:
            child.join()
            paths = paths[1:]
            yield Outcome([], f"it ends its process: {child.exitcode}", 0)
        finally:
            child.kill()
            child.join()


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Store]:
    return stores(tmp_path_factory.mktemp("stores"))


@pytest.fixture(scope="module")
def originals(sources, tmp_path_factory) -> dict[str, list[Original]]:
    """The samples of every store, by their number, read where nothing is damaged."""
    found = {}
    for name, store in sources.items():
        folder = tmp_path_factory.mktemp("undamaged")
        path = Case(kind="", what="", store=store, files={}).write(folder)
        source = open_source(SourceConfig(path=str(path)))
        order = SourceOrder("data", np.array(source.sizes))
        places = {
            (key.shard, key.row): each
            for key, each in zip(order.read(0, 0, 0, NUMBER), read(path), strict=True)
        }
        found[name] = [
            Original(
                places[place],
                source.address(*place).removeprefix(str(folder)),
                f"/{store.path}#{place[1]}" if store.path else "",
            )
            for place in sorted(places)
        ]
        assert len({each.reading.concept for each in found[name]}) == NUMBER
        assert len({each.reading.image for each in found[name]}) == NUMBER
    return found


# Judging.


def differs(reading: Reading, case: Case, originals: Sequence[Original]) -> str:
    """Say how one reading differs from the sample of its concept, if it may not."""
    number = next(
        (n for n, of in enumerate(originals) if of.reading.concept == reading.concept), -1
    )
    if not reading.image or number in case.free:
        return ""
    if number < 0:
        return "" if case.adds or case.free else f"a sample that was not there: {reading}"
    expected = originals[number].reading
    uid = expected.uid if case.free else reading.uid  # rows after one more or less are renumbered
    image = expected.image if number in case.changed else reading.image
    same = reading._replace(uid=uid, image=image)[:4] == expected[:4]
    return "" if same else f"found {reading}, expected {expected}"


def wrong_in(case: Case, originals: Sequence[Original], found: Sequence[Reading]) -> str:
    """Say what is wrong with what was read of a damaged source, if anything is.

    Every sample must be read as it was, or be named as one that is skipped. Letters of a text and
    pixels of an image that no hash knows may be others, of the samples that the case names.
    """
    for reading in found:
        if difference := differs(reading, case, originals):
            return difference
    if len(found) < NUMBER - len(case.free):
        return f"{len(found)} of {NUMBER} samples"
    there = {reading.concept for reading in found if not reading.skipped}
    skipped = [each for reading in found for each in reading.skipped]
    for number, (reading, address, row) in enumerate(originals):
        ends = (address, row or address)
        named = any(one.uid == reading.uid or one.address.endswith(ends) for one in skipped)
        if not named and reading.concept not in there and number not in case.free:
            return f"{address} is lost; skipped are {skipped}"
    return ""


def judged(
    cases: Sequence[Case], originals: Mapping[str, Sequence[Original]], folder: Path
) -> Counter[tuple[str, str, str]]:
    """Return by store and kind how often damage was reported, and how often it was harmless.

    An error of opening is about all samples. What skips samples is read again, from its middle.
    """
    paths = [case.write(folder / str(number)) for number, case in enumerate(cases)]
    counts: Counter[tuple[str, str, str]] = Counter()
    faults, skips = [], []
    for case, path, (found, fault, memory) in zip(cases, paths, outcomes(paths), strict=True):
        refused = isinstance(found, str)
        wrong = fault or ("" if refused else wrong_in(case, originals[case.store.name], found))
        if memory > MEMORY:
            wrong = wrong or f"it takes {memory >> 20} MiB"
        if wrong:
            faults.append(f"{case}: {wrong:.600}")
        if not refused and any(reading.skipped for reading in found):
            skips.append((case, path, found))
        outcome = (
            "refused" if refused else "skipped" if skips and skips[-1][0] is case else "harmless"
        )
        counts[case.store.name, case.kind, outcome] += 1
    again = outcomes([path for _, path, _ in skips], first=5)
    for (case, _, found), outcome in zip(skips, again, strict=True):
        if outcome.found != found[5:]:
            faults.append(f"{case}: a resumed run reads {outcome}")
    shutil.rmtree(folder)  # it has large files
    assert not faults, f"{len(faults)} of {len(cases)}:\n" + "\n".join(faults)
    return counts


def test_some_of_the_damage_is_told_or_harmless(sources, originals, tmp_path):
    judged(list(Injections(sources, 0).all())[::20], originals, tmp_path)


@pytest.mark.slow
def test_no_damage_loses_a_sample_in_silence(sources, originals, tmp_path):
    cases = list(Injections(sources, 0).all())
    counts = judged(cases, originals, tmp_path)
    assert len(cases) >= 600
    # Of each store some damage is refused or skipped, and some does no harm.
    assert {store for store, _, said in counts if said != "harmless"} == set(sources)


def test_the_judge_misses_no_sample_that_is_lost_or_exchanged(sources, originals):
    case = Case(kind="", what="", store=sources["tars"], files={})
    samples = originals["tars"]
    found = [each.reading for each in samples]
    assert wrong_in(case, samples, found) == ""
    assert "samples" in wrong_in(case, samples, found[1:])
    assert "lost" in wrong_in(case, samples, [found[1], *found[1:]])
    for name, value in (("captions", {"zh": "", "en": "x"}), ("image", "x"), ("uid", "x")):
        assert "expected" in wrong_in(
            case, samples, [found[0]._replace(**{name: value}), *found[1:]]
        )
    skipped = (SkippedSample("", samples[0].address, "damaged"),)
    assert wrong_in(case, samples, [found[1]._replace(skipped=skipped), *found[1:]]) == ""


def test_an_index_in_the_cache_folder_with_a_changed_byte_is_made_again(
    sources, originals, tmp_path, monkeypatch
):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    case = Case(kind="", what="", store=sources["t.tsv"], files={})
    path = case.write(tmp_path / "data")
    expected = read(path)
    (index,) = (tmp_path / "cache").rglob("*.arrow")
    whole = index.read_bytes()
    for place in range(0, len(whole), len(whole) // 40):
        index.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert read(path) == expected
        assert index.read_bytes() == whole
