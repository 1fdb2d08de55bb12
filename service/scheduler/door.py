"""The door of a lane: which jobs fit the model, which can be done in time, and how much work each brings.

Asked by the threads that receive requests; only reads what the engine thread learns. Times in seconds of the scheduler's clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from models.artifact import Card
from service.errors import DeadlineExceeded, InvalidInput
from service.noise import MAX_STEP
from service.scheduler.cost import CostModel
from service.scheduler.final_stages import FinalStages
from service.scheduler.job import Job
from service.scheduler.load import Load
from service.scheduler.pace import Pace
from service.scheduler.queue import Ticket
from service.scheduler.reserve import Reserve
from service.scheduler.rows import RowTable


class Door:
    """Where a ticket gets its prediction, its deadline for the last step, and its work."""

    def __init__(self, card: Card, rows: RowTable, cost: CostModel, pace: Pace, stages: FinalStages, load: Load, reserve: Reserve):
        self._card, self._rows, self._cost, self._pace = card, rows, cost, pace
        self._stages, self._load, self._reserve = stages, load, reserve
        self._shapes = {"x": card.x.shape, "mask": card.x.shape, **{tensor.name: tensor.shape[1:] for tensor in card.carry}}

    def prepare(self, ticket: Ticket, now: float) -> None:
        """Checks that the job fits the model and can be done in time, and predicts how long it takes.

        Raises:
            InvalidInput: more steps than the card or the noise allows, or arrays of the wrong shape.
            DeadlineExceeded: not even what must be done fits before the deadline.
        """
        job, budget, cost = ticket.job, ticket.job.budget, self._cost
        self._check(job)
        together = min(job.rows, self._rows.capacity)
        start = cost.seconds("init", together) + cost.seconds("score", together * job.ask.samples)
        stages = self._stages.seconds(ticket) if self._stages.needed(ticket) else 0.0
        final = self._reserve.typical + stages
        at_once = self._pace.places(self._pace.tick_s)
        rounds = math.ceil((self._rows.in_flight + job.rows) / at_once)
        step = rounds * cost.seconds("step", min(at_once, self._rows.in_flight + job.rows))
        steps = steps_of(job, self._card)
        ticket.predicted_s = start + final + steps * step
        row_s = cost.seconds("init", at_once) + cost.seconds("score", at_once) * job.ask.measure
        step_s = cost.seconds("step", at_once) / at_once
        ticket.work = self._load.work(ticket.rows, steps, budget.elastic, step_s, row_s / at_once + stages / max(1, ticket.rows))
        if budget.deadline is None:
            return
        ticket.deadline = budget.deadline - final
        if budget.elastic:
            ticket.predicted_s = min(ticket.predicted_s, budget.deadline - now)
        needed = start if budget.elastic else start + steps * cost.seconds("step", together)
        # never more than as much again: what is expected to take half of the time that is left is let in
        if now + needed + min(self._reserve.door, needed + final) > ticket.deadline:
            what = "0 steps" if budget.elastic else f"{steps} steps"
            raise DeadlineExceeded(
                f"{what} would take {1e3 * (needed + final):.1f} ms, the deadline leaves {1e3 * (budget.deadline - now):.1f} ms"
            )

    def _check(self, job: Job) -> None:
        """What must hold so that no job can spoil the batch of another."""
        card, rows = self._card, job.rows
        if card.iterative and not 0 <= job.budget.steps <= card.max_steps:
            raise InvalidInput.at("steps", f"must be between 0 and {card.max_steps}, got {job.budget.steps}")
        if job.ask.samples < 1:
            raise InvalidInput.at("samples", f"must be at least 1, got {job.ask.samples}")
        if job.first_step is not None:
            last = int(np.max(job.first_step, initial=0)) + job.budget.steps
            if np.min(job.first_step, initial=0) < 0 or last > MAX_STEP:
                raise InvalidInput.at("posterior.step", f"must be at least 0, and at most {MAX_STEP} after all steps")
        shapes: Mapping[str, tuple[int | str, ...]] = self._shapes
        given = [("x", job.x), ("mask", job.mask), *(job.carry or {}).items()]
        if job.z is not None:
            shapes = {level.name: (level.size,) for level in card.levels}
            given = [(name, job.z.get(name, np.empty(0))) for name in shapes]
        for name, value in given:
            expected = (rows, *shapes[name]) if name in shapes else None
            if value is not None and value.shape != expected:
                raise InvalidInput.at(name, f"must have shape {expected}, got {value.shape}" if expected else "is not in the model's carry")


def steps_of(job: Job, card: Card) -> int:
    """Refinement steps that the job asks for: none where there is nothing to refine."""
    return job.budget.steps if card.iterative and job.x is not None else 0
