"""How much of a deadline is kept free for what follows the last step: learned from the replies themselves.

Three numbers, in seconds. `typical` is what a reply usually takes from the scheduler's answer to the bytes that leave; the door
asks it. `tail` comes on top where steps are given out: it grows with every deadline that was missed and shrinks a little with every
one that was met, and so settles where about one in 250 is missed, whatever makes this machine late (the other thread holding the
interpreter, a neighbour on the core). A reply without a step says nothing of that, for no step could have been left out: it moves
`door`, what the door asks for on top before it lets a deadline in.
"""

from __future__ import annotations

import math

_WEIGHT = 0.05
"""Of a new reply in `typical`; none counts as more than twice that, so that it stays near the median."""
_SEND_S = 0.0002
"""From the finished reply to its last byte in the socket: out of our sight, hence a constant."""
_RISE_S, _OF_LATENESS = 0.0004, 0.5
"""What a miss adds: the more, the later it was, so that the first few lead to where it settles."""
_MISSES, _MISSES_AT_DOOR = 0.004, 0.008
_LEAST_S, _MOST_S = 0.0001, 0.02
_APART_S = 0.01
"""Misses closer than this have one cause (the machine stood still) and count once."""


class Reserve:
    """Written by the event loop that replies, read by the engine thread: floats need no lock."""

    def __init__(self, typical_s: float):
        self.typical = typical_s
        self.tail = _RISE_S
        self.door = 0.0
        self._last_miss = -math.inf

    def observe(self, seconds: float) -> None:
        """A reply was ready so long after the scheduler's answer."""
        self.typical += _WEIGHT * (min(seconds + _SEND_S, 2 * self.typical) - self.typical)

    def judge(self, spare_s: float, now: float, stepped: bool) -> None:
        """A reply whose steps ended at its deadline was ready `spare_s` before it (negative: after it)."""
        late_s = _SEND_S - spare_s
        if late_s > 0 and now - self._last_miss < _APART_S:
            return
        if late_s > 0:
            self._last_miss = now
        rise = _RISE_S + _OF_LATENESS * late_s
        if stepped:
            self.tail = min(_MOST_S, max(_LEAST_S, self.tail + (rise if late_s > 0 else -_MISSES * _RISE_S)))
        else:
            self.door = min(_MOST_S, max(0.0, self.door + (rise if late_s > 0 else -_MISSES_AT_DOOR * _RISE_S)))
