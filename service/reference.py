"""Where a row's ELBO lies among the reference rows of its card: the drift signal of the metrics. Plain floats, a microsecond a row."""

from __future__ import annotations

import math
from bisect import bisect_left

from models.artifact import Quantiles


class Reference:
    """The card's quantiles, ready to be asked once per request."""

    def __init__(self, quantiles: Quantiles):
        self._steps, self._tables, self._probabilities = quantiles.steps, quantiles.elbo, quantiles.probabilities
        self._by_steps: dict[int, tuple[float, ...]] = {}

    def quantile(self, steps: int, elbo: float) -> float | None:
        """The share of reference rows with a smaller ELBO after the nearest number of steps, linear between the card's quantiles.

        Outside the stored quantiles it is the outermost stored probability; None where the card has none or the ELBO is not finite.
        """
        if not self._steps or not math.isfinite(elbo):
            return None
        table = self._by_steps.get(steps)
        if table is None:
            nearest = min(range(len(self._steps)), key=lambda index: abs(self._steps[index] - steps))
            table = self._by_steps[steps] = self._tables[nearest]
        above = bisect_left(table, elbo)
        if above == 0:
            return self._probabilities[0]
        if above == len(table):
            return self._probabilities[-1]
        low, high = table[above - 1], table[above]
        share = (elbo - low) / (high - low)
        return self._probabilities[above - 1] + share * (self._probabilities[above] - self._probabilities[above - 1])
