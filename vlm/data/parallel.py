"""A function over many files: in processes where there is much to read."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

from tqdm import tqdm

LITTLE = 1 << 26  # bytes that are read sooner than processes start
TYPICAL_BYTES = 1 << 14
"""Of a sample, where only the number of samples is known."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def over(
    function: Callable[[_Item], _Result], items: Sequence[_Item], *, size: int, title: str
) -> Iterator[_Result]:
    """Give the results of a function in the order of the items, with a bar on a terminal.

    Args:
        function: One that can be sent to a process.
        items: What to call it with.
        size: Bytes of all items together.
        title: What the bar is called.
    """
    processes = min(len(items), len(os.sched_getaffinity(0))) if size > LITTLE else 1
    shown: dict[str, Any] = {"total": len(items), "desc": title, "unit": "shard"}
    shown["disable"] = not sys.stderr.isatty()
    if processes < 2:
        yield from tqdm(map(function, items), **shown)
        return
    with ProcessPoolExecutor(processes) as executor:
        try:
            yield from tqdm(executor.map(function, items), **shown)
        except BaseException:
            executor.shutdown(cancel_futures=True)  # an error is not kept waiting
            raise
