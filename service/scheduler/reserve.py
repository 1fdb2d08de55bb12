"""How much of a deadline is kept free for what follows the last step: learned from the replies themselves.

Two numbers, in seconds. `typical` is what a reply usually takes from the scheduler's answer to the bytes that leave; the door
asks it, so that a deadline is refused only if it usually cannot be met. `tail` comes on top where steps are given out: it grows
with every deadline that was missed and shrinks a little with every one that was met, and so settles where about one in
250 is missed, whatever makes this machine late (the other thread holding the interpreter, a neighbour on the core).
"""

from __future__ import annotations

import math

_WEIGHT = 0.05
"""Of a new reply in `typical`; none counts as more than twice that, so that it stays near the median."""
_SEND_S = 0.0002
"""From the finished reply to its last byte in the socket: out of our sight, hence a constant."""
_RISE_S = 0.0004
_MISSES = 0.004
_LEAST_S, _MOST_S = 0.0001, 0.02
_APART_S = 0.01
"""Misses closer than this have one cause (the machine stood still) and count once."""


class Reserve:
    """Written by the event loop that replies, read by the engine thread: two floats need no lock."""

    def __init__(self, typical_s: float):
        self.typical = typical_s
        self.tail = _RISE_S
        self._last_miss = -math.inf

    def observe(self, seconds: float) -> None:
        """A reply was ready so long after the scheduler's answer."""
        self.typical += _WEIGHT * (min(seconds + _SEND_S, 2 * self.typical) - self.typical)

    def judge(self, spare_s: float, now: float) -> None:
        """A reply whose steps ended at its deadline was ready `spare_s` before it (negative: after it)."""
        if spare_s >= _SEND_S:
            self.tail = max(_LEAST_S, self.tail - _MISSES * _RISE_S)
        elif now - self._last_miss >= _APART_S:
            self._last_miss = now
            self.tail = min(_MOST_S, self.tail + _RISE_S)
