"""Turn a folder of images, or a split of a data folder, into an embeddings folder."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vlm.cli.processes import refuse_several_processes
from vlm.embedding.embedder import Embedder
from vlm.embedding.parts import ListedImage, SplitImages, images_in_folder, write_embeddings
from vlm.errors import VlmError


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of `vlm embed`."""
    parser.add_argument("bundle", type=Path, help="folder of the bundle to embed with")
    parser.add_argument("--images", type=Path | None, default=None, help="folder of images")
    parser.add_argument(
        "--data", type=Path | None, default=None, help="data folder (instead of --images)"
    )
    parser.add_argument("--split", type=str, default="test_style", help="split of the data folder")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="new folder for the embeddings; one that is not finished is gone on with",
    )
    parser.add_argument("--device", type=str | None, default=None, help="such as cpu or cuda:0")
    parser.add_argument(
        "--truncate_dim", type=int | None, default=None,
        help="keep only the first N dimensions (a Matryoshka width of the model)",
    )  # fmt: skip
    parser.add_argument(
        "--allowed_share", type=float, default=0.01,
        help="ratio of images that may be unreadable, and are left out; at least one but for 0",
    )  # fmt: skip


def run(options: Any) -> None:
    """Embed the images; print the folder."""
    if (options.images is None) == (options.data is None):
        raise VlmError("vlm embed needs either --images FOLDER or --data FOLDER")
    refuse_several_processes("embed")
    images: Iterable[ListedImage]
    if options.images is not None:
        images, left_out = images_in_folder(options.images)
        for reason, count in left_out.items():
            print(f"left out of {options.images}: {count} {reason}", file=sys.stderr)
    else:
        images = SplitImages(options.data, options.split)
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
