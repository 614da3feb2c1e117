"""The images below a folder: the one walk that embedding and classification share."""

import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

IMAGE_SUFFIXES = frozenset({".gif", ".jpeg", ".jpg", ".png", ".webp"})
OTHER_SUFFIX = "with another suffix"


class FolderImages(NamedTuple):
    """What a walk found."""

    paths: list[Path]
    """In sorted order."""
    left_out: Counter[str]
    """How many entries are not taken, by the reason."""


def images_below(folder: Path) -> FolderImages:
    """Return every image below a folder by its suffix, and count what is left out.

    A name that begins with a dot is left out with all below it, such as macOS's `._cat.jpg` and
    `.ipynb_checkpoints`; so are links to folders. A link to nothing is taken: whoever reads it
    names it, as a damaged file.
    """
    paths: list[Path] = []
    left_out: Counter[str] = Counter()
    for place, folders, files in os.walk(folder):
        left_out["links to folders"] += sum(Path(place, name).is_symlink() for name in folders)
        left_out["hidden"] += sum(name.startswith(".") for name in (*folders, *files))
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(place, name) for name in files if not name.startswith(".")):
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                left_out[OTHER_SUFFIX] += 1
            elif path.is_file() or not path.exists():
                paths.append(path)
            else:  # a pipe, which would block its reader, or a socket
                left_out["not regular files"] += 1
    return FolderImages(sorted(paths), +left_out)
