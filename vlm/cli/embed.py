"""Turn a folder of images, or a source of images with captions, into an embeddings folder."""

import sys
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from vlm.cli.options import ModelOptions, refuse_several_processes
from vlm.errors import VlmError


@dataclass(frozen=True)
class Options(ModelOptions):
    """What `vlm embed` is given."""

    bundle: Path
    """Folder of the bundle to embed with."""
    _: KW_ONLY
    images: Path | None = None
    """Folder of images."""
    data: Path | None = None
    """Data folder, tars, or a table of images (instead of --images)."""
    split: str | None = None
    """Split of the data; null is test_style of a data folder, and train of others."""
    out: Path
    """Folder for the embeddings; an unfinished one is continued."""
    allowed_share: float = 0.01
    """Ratio of images that may be unreadable, and are left out; at least one unless it is 0."""


def run(options: Options) -> None:
    """Embed the images; print the folder."""
    if (options.images is None) == (options.data is None):
        raise VlmError("vlm embed needs either --images FOLDER or --data FOLDER")
    refuse_several_processes("embed")
    from vlm.data.config import DEFAULT_SPLIT
    from vlm.data.manifest import is_data_folder
    from vlm.embedding.embedder import Embedder
    from vlm.embedding.parts import ListedImage, SplitImages, images_in_folder, write_embeddings

    images: Iterable[ListedImage]
    if options.images is not None:
        images, left_out = images_in_folder(options.images)
        for reason, count in left_out.items():
            print(f"left out of {options.images}: {count} {reason}", file=sys.stderr)
    elif options.data is not None:
        default = "test_style" if is_data_folder(options.data) else DEFAULT_SPLIT
        images = SplitImages(options.data, options.split or default)
    embedder = Embedder.load(
        options.bundle, device=options.device, truncate_dim=options.truncate_dim
    )
    written = write_embeddings(
        embedder,
        images,
        options.out,
        bundle=options.bundle,
        allowed_share=options.allowed_share,
    )
    for reason in written.unreadable.values():
        print(f"left out: {reason}", file=sys.stderr)
    print(options.out)
