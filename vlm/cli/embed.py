"""Turn a folder of images, or a source of images with captions, into an embeddings folder."""

import sys
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path

from vlm.cli.options import ModelOptions, refuse_several_processes
from vlm.cli.parsing import part_of
from vlm.data.config import SourceConfig, SourceFields
from vlm.errors import ConfigError, VlmError


@dataclass(frozen=True)
class Options(SourceFields, ModelOptions):
    """What `vlm embed` is given."""

    bundle: Path
    """Folder of the bundle to embed with."""
    _: KW_ONLY
    images: Path | None = None
    """Folder of images; with --data, the folder that relative paths in a table start from."""
    data: str | None = None
    """Data folder, tars, a table of images, or a folder of images with captions next to them, here
    or at a URL."""
    split: str | None = None
    """Split of the data; null is the only one or test_style of a data folder, and train of
    others."""
    where: tuple[str, ...] = ()
    """Conditions on samples of the data, such as `source=noto` or `group!=flags`."""
    out: Path
    """Folder for the embeddings; an unfinished one is continued."""
    allowed_share: float = 0.01
    """Ratio of images that may be unreadable, and are left out; at least one unless it is 0."""

    def source(self, data: str) -> SourceConfig:
        """Return the source to embed."""
        from vlm.data.layout import default_split

        return SourceConfig(
            path=data,
            split=self.split or default_split(data, "test_style"),
            images=self.images,
            where=self.where,
            **vars(part_of(self, SourceFields)),
        )


def run(options: Options) -> None:
    """Embed the images; print the folder."""
    if options.data is None:
        _check_images_alone(options)
    refuse_several_processes("embed")
    from vlm.embedding.embedder import Embedder
    from vlm.embedding.parts import ListedImage, SplitImages, images_in_folder, write_embeddings

    images: Iterable[ListedImage]
    if options.data is not None:
        images = SplitImages(options.source(options.data))
    elif options.images is not None:
        images, left_out = images_in_folder(options.images)
        for reason, count in left_out.items():
            print(f"left out of {options.images}: {count} {reason}", file=sys.stderr)
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


def _check_images_alone(options: Options) -> None:
    """Refuse options that would be ignored without --data."""
    if options.images is None:
        raise VlmError("vlm embed needs --images FOLDER or --data SOURCE")
    of_data = ("split", "where", *(each.name for each in fields(SourceFields)))
    if given := [name for name in of_data if getattr(options, name)]:
        raise ConfigError(f"found {' and '.join(given)} without data; expected --data SOURCE")
