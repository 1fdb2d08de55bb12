"""How long a program takes on a batch: learned at warm-up, corrected by every run, asked at admission and at every tick.

Per program, seconds at batch sizes 1, 2, 4, … with straight lines between them. The size of a batch is rows, or rows × samples
for the programs whose work grows with the samples they are given.
"""

from __future__ import annotations

import math

_WORTH = 0.97
"""A batch twice as large is worth its longer run if it costs at most this much per row."""


class CostModel:
    """Seconds by (program, size). Knows nothing at first: a program never seen costs nothing."""

    def __init__(self, weight: float = 0.1):
        """`weight` of a new observation in the moving average."""
        self._weight = weight
        self._tables: dict[str, list[float]] = {}

    def observe(self, program: str, size: int, seconds: float) -> None:
        """Corrects the two buckets around `size`, in the proportion in which what was measured exceeds what was predicted.

        No observation counts as more than half off, so that the prediction is about the median: a run during which the machine
        was busy elsewhere may take ten times as long, and must not make later batches small.
        """
        if size < 1:
            return
        table = self._tables.setdefault(program, [])
        upper = (size - 1).bit_length()
        while len(table) <= upper:
            table.append(2 * table[-1] if table else seconds)
        predicted = self.seconds(program, size)
        if predicted <= 0.0:
            table[upper] = seconds
            return
        excess = min(1.5, max(0.5, seconds / predicted)) - 1
        share = size / (1 << upper)
        table[upper] *= 1 + self._weight * share * excess
        if upper and share < 1.0:
            table[upper - 1] *= 1 + self._weight * (1 - share) * excess

    def seed(self, program: str, size: int, seconds: float) -> None:
        """States the cost of a batch whose size is a power of two, as measured at warm-up."""
        bucket = size.bit_length() - 1
        if size != 1 << bucket:
            raise ValueError(f"size: {size} is not a power of two")
        table = self._tables.setdefault(program, [])
        while len(table) <= bucket:
            table.append(seconds if not table else max(table[-1], seconds))
        table[bucket] = seconds

    def seconds(self, program: str, size: int) -> float:
        """The predicted time of one run; beyond the largest size seen, in proportion."""
        table = self._tables.get(program)
        if not table or size < 1:
            return 0.0
        upper = (size - 1).bit_length()
        if upper >= len(table):
            return table[-1] * size / (1 << (len(table) - 1))
        if upper == 0:
            return table[0]
        low = 1 << (upper - 1)
        return table[upper - 1] + (table[upper] - table[upper - 1]) * (size - low) / low

    def largest(self, program: str, seconds: float, limit: int, fixed: float = 0.0) -> int:
        """The largest size, 1 … limit, whose run fits into `seconds`; but never so small that batching is given away.

        A smaller batch than that would end sooner and yet make everybody wait longer: the same work takes more runs, each
        nearly as long. `fixed` seconds are spent once per run, beside it.
        """
        table = self._tables.get(program)
        if not table or table[-1] <= 0.0:
            return limit
        return max(self._efficient(table, limit, fixed), self._fitting(table, seconds, limit))

    @staticmethod
    def _efficient(table: list[float], limit: int, fixed: float) -> int:
        """The size from which on doubling saves less than 3 % per row."""
        size, bucket = 1, 0
        while 2 * size <= limit and bucket + 1 < len(table) and fixed + table[bucket + 1] < 2 * _WORTH * (fixed + table[bucket]):
            size, bucket = 2 * size, bucket + 1
        return size

    @staticmethod
    def _fitting(table: list[float], seconds: float, limit: int) -> int:
        if seconds >= table[-1]:
            return max(1, min(limit, int((1 << (len(table) - 1)) * min(seconds / table[-1], float(limit)))))
        for bucket in range(len(table) - 2, -1, -1):
            at, above = table[bucket], table[bucket + 1]
            if at <= seconds:
                inside = (seconds - at) / (above - at) if above > at else 1.0
                return max(1, min(limit, math.floor((1 << bucket) * (1 + inside))))
        return 1
