"""Writing a data folder: the shards of every split, the manifest, and what goes with them."""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from tools.splits import SPLITS, digest
from vlm.data.manifest import MANIFEST_NAME, Manifest, write_manifest
from vlm.data.sample import Sample
from vlm.data.shards import write_shards
from vlm.errors import DataError
from vlm.files import write_file, write_folder

_SAMPLES_PER_SHARD = 2000
_SHARD_NAME = re.compile(rf"({'|'.join(SPLITS)})-\d{{5}}\.tar\.gz")


def require_replaceable(
    out: Path, *, kind: str, files: Collection[str], optional: Collection[str] = ()
) -> None:
    """Check that nothing but an older build would be lost by writing to `out`.

    Args:
        out: The data folder to write.
        kind: What the set is called in errors.
        files: The names of what every such folder holds besides manifest and shards.
        optional: The names of what it may hold as well.

    Raises:
        DataError: `out` is a file, or a folder that holds something else.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out} is a file; --out names the data folder to write")
    expected = {MANIFEST_NAME, *files}
    found = {path.name for path in out.iterdir()}
    foreign = {name for name in found - expected - set(optional) if not _SHARD_NAME.fullmatch(name)}
    if foreign or (found and not found >= expected):
        raise DataError(
            f"{out} is there and is not an {kind} data folder (it holds "
            f"{min(foreign or found)}); remove it or choose another folder"
        )


def write_data_folder(
    out: Path, samples: Mapping[str, Sequence[Sample]], files: Mapping[str, bytes]
) -> None:
    """Write the samples of every split, the manifest and further files; `out` is replaced.

    Raises:
        VlmError: the disk is full or `out` cannot be written.
    """
    with write_folder(out) as folder:
        shards = {
            split: write_shards(
                sorted(samples[split], key=_mixed_order),
                folder,
                split=split,
                samples_per_shard=_SAMPLES_PER_SHARD,
            )
            for split in SPLITS
        }
        write_manifest(folder, Manifest(splits=shards))
        for name, content in files.items():
            write_file(folder / name, content)


def _mixed_order(sample: Sample) -> str:
    """Mix styles and concepts, so that every shard is a fair sample of its split."""
    return digest(sample.uid)
