"""Turn a folder of images, or a split of a data folder, into an embeddings folder."""

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vlm.embedding.embedder import Embedder
from vlm.embedding.parts import images_in_folder, images_in_split, write_embeddings
from vlm.errors import VlmError


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of `vlm embed`."""
    parser.add_argument("bundle", type=Path, help="folder of the bundle to embed with")
    parser.add_argument("--images", type=Path | None, default=None, help="folder of images")
    parser.add_argument("--data", type=Path | None, default=None, help="data folder, instead")
    parser.add_argument("--split", type=str, default="test_style", help="split of the data folder")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the embeddings")
    parser.add_argument("--device", type=str | None, default=None, help="such as cpu or cuda:0")
    parser.add_argument(
        "--truncate_dim", type=int | None, default=None,
        help="use the first so many numbers of each vector, where they were trained so",
    )  # fmt: skip


def run(options: Any) -> None:
    """Embed the images; print the folder."""
    if (options.images is None) == (options.data is None):
        raise VlmError("vlm embed needs either --images FOLDER or --data FOLDER")
    images = (
        images_in_folder(options.images)
        if options.images
        else images_in_split(options.data, options.split)
    )
    embedder = Embedder.load(
        options.bundle, device=options.device, truncate_dim=options.truncate_dim
    )
    write_embeddings(embedder, images, options.out, bundle=options.bundle)
    print(options.out)
