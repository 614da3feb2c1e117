"""Labelled images: samples of a source by one of their labels, or folders by class."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from vlm.data.config import SourceConfig
from vlm.data.image_folder import IMAGE_SUFFIXES, images_below
from vlm.data.sample import Sample
from vlm.data.source import open_source
from vlm.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledImages:
    """Images, each of one class."""

    images: Sequence[bytes | Path]
    """Encoded images or their files."""
    addresses: Sequence[str]
    """Where each image lies: its file, or `FOLDER/SHARD#ROW`."""
    labels: Int[np.ndarray, " images"]
    """The number of each image's class."""
    left_out: int
    """Samples without the label, or what `images_below` leaves out of a folder."""

    def fingerprint(self, digests: Sequence[bytes]) -> str:
        """Return the SHA-256 of labels and of what `BulkEmbedder.digests_of` gives for images."""
        pairs = zip(self.labels.tolist(), digests, strict=True)
        joined = b"".join(f"{label}\0".encode() + digest for label, digest in pairs)
        return hashlib.sha256(joined).hexdigest()


def images_of_source(
    config: SourceConfig, *, label: str, class_ids: Sequence[str]
) -> LabelledImages:
    """Return the samples of a source that have the label.

    Args:
        config: The source.
        label: Name of the label with a sample's class.
        class_ids: Values of the label, in the order of the classes.

    Raises:
        DataError: the split cannot be read, a condition is invalid or has a key that no sample
            has, a label is not a class, or no sample is left.
    """
    source = open_source(config)
    number_of = {class_id: number for number, class_id in enumerate(class_ids)}
    kept: list[Sample] = []
    left_out = 0
    for sample in source:
        value = sample.labels.get(label)
        if value is None:
            left_out += 1
            continue
        if value not in number_of:
            raise DataError(
                f"{sample.uid} in {source.name} has the {label} {value!r}; expected one of the "
                f"{len(class_ids)} with names"
            )
        kept.append(sample)
    if not kept:
        raise DataError(f"no selected sample of {source.name} has the label {label!r}")
    return LabelledImages(
        images=[sample.image for sample in kept],
        addresses=[sample.address for sample in kept],
        labels=np.array([number_of[sample.labels[label]] for sample in kept], np.int64),
        left_out=left_out,
    )


def class_folders(folder: Path) -> list[str]:
    """Return the sorted names of the sub-folders, each with the images of a class.

    Raises:
        DataError: the folder is missing, or has no sub-folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; expected one with a folder for each class")
    names = sorted(
        path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    if not names:
        raise DataError(f"{folder} has no folders; expected one for each class")
    return names


def images_in_class_folders(folder: Path, class_ids: Sequence[str]) -> LabelledImages:
    """Return every image below the classes' folders, as torchvision's ImageFolder does.

    Args:
        folder: Holds a folder for each class; a class without one has no images.
        class_ids: Names of the folders, in the order of the classes.

    Raises:
        DataError: no folder has an image.
    """
    found = [images_below(folder / class_id) for class_id in class_ids]
    images = [path for of_class in found for path in of_class.paths]
    if not images:
        raise DataError(
            f"the class folders in {folder} have no image ({', '.join(sorted(IMAGE_SUFFIXES))})"
        )
    return LabelledImages(
        images=images,
        addresses=[str(path) for path in images],
        labels=np.repeat(np.arange(len(found)), [len(of_class.paths) for of_class in found]),
        left_out=sum(of_class.left_out.total() for of_class in found),
    )
