"""Rebuild the icon images and captions from their pinned packages, the same bytes every time.

Run in a clone of the project: `python -m tools.icons --out data/icons`.
"""

from pathlib import Path

from jsonargparse import auto_cli

from tools.icons.build import build_icons

_CACHE = Path.home() / ".cache/vlm/icons"


def build(*, out: Path, cache: Path = _CACHE) -> None:
    """Build the data folder; print it.

    Args:
        out: Folder for the shards.
        cache: Folder for the downloaded packages.
    """
    build_icons(out, cache=cache)
    print(out)


if __name__ == "__main__":
    auto_cli(build, as_positional=False)
