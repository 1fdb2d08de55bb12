"""One call shared out by rows: every thread runs the whole program on its part of them.

Rows do not see each other, so nothing has to wait for anything before the end. Threads that share every single operator wait for
each other after each of them: on two cores 64 rows took 1.15 × as long that way, 8 rows 1.25 × (docs/decisions/engine-threads.md).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEAST_ROWS = 4
"""Of a thread: fewer would not pay for reading the weights once more and for waking it."""

Feeds = dict[str, NDArray[Any]]
Returned = list[NDArray[Any]]


class Crew:
    """As many threads as it is told, the caller's among them. They sleep between calls."""

    def __init__(self, threads: int):
        self._threads = threads
        self._helpers = ThreadPoolExecutor(threads - 1, thread_name_prefix="elbow-rows") if threads > 1 else None

    def run(self, call: Callable[[Feeds], Returned], feeds: Feeds) -> Returned:
        """What `call` gives for `feeds`, arrays with one row each per row, as its outputs are. Raises what `call` raises, when no
        thread is in it any more."""
        rows = len(next(iter(feeds.values())))
        parts = min(self._threads, rows // LEAST_ROWS)
        if parts < 2 or self._helpers is None:
            return call(feeds)
        ends = [rows * part // parts for part in range(parts + 1)]
        first, *others = ({name: value[a:b] for name, value in feeds.items()} for a, b in pairwise(ends))
        helped = [self._helpers.submit(call, part) for part in others]
        try:
            mine = call(first)
        finally:
            wait(helped)
        return [np.concatenate(pieces) for pieces in zip(mine, *(future.result() for future in helped), strict=True)]

    def close(self) -> None:
        """Ends the helpers."""
        if self._helpers is not None:
            self._helpers.shutdown()
