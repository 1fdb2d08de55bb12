"""How fast a lane goes: how many rows a tick steps, and what a tick costs beside its steps. Times in seconds."""

from __future__ import annotations

from service.scheduler.cost import CostModel


class Pace:
    """Learned from the ticks themselves (`observe`, on the engine thread); read at the door too.

    Attributes:
        tick_s: what a tick should take. overhead_s: what it spends outside the engine.
    """

    def __init__(self, cost: CostModel, slots: int, tick_s: float):
        self.tick_s, self.overhead_s = tick_s, 0.0
        self._cost, self._slots = cost, slots

    def observe(self, overhead_s: float) -> None:
        """No tick counts as more than twice the usual: one in which the machine was elsewhere says nothing about the next."""
        self.overhead_s += 0.1 * (min(overhead_s, 2 * self.overhead_s + 1e-4) - self.overhead_s)

    def places(self, budget_s: float) -> int:
        """How many rows a tick of `budget_s` steps: fewer would spend it on what a tick costs however many there are."""
        fixed = self.overhead_s + self._cost.seconds("init", 1) + self._cost.seconds("score", 1)
        return self._cost.largest("step", budget_s, self._slots, fixed)
