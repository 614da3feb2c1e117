"""A function over many files: in processes where there is much to read."""

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import TypeVar

from tqdm import tqdm

LITTLE = 1 << 26  # bytes that are read sooner than processes start
TYPICAL_BYTES = 1 << 14
"""Of a sample, where only the number of samples is known."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def over(
    function: Callable[[_Item], _Result], items: Sequence[_Item], *, size: int, title: str
) -> list[_Result]:
    """Return the results of a function in the order of the items; a bar is shown on a terminal.

    Args:
        function: One that can be sent to a process.
        items: What to call it with.
        size: Bytes of all items together.
        title: What the bar is called.
    """
    processes = min(len(items), len(os.sched_getaffinity(0))) if size > LITTLE else 1
    shown = items and sys.stderr.isatty()
    bar = partial(tqdm, total=len(items), desc=title, unit="shard", disable=not shown)
    if processes < 2:
        return list(bar(map(function, items)))
    with ProcessPoolExecutor(processes) as executor:
        return list(bar(executor.map(function, items)))
