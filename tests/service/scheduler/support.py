"""A clock that stands still, and jobs on the closed-form engine."""

import numpy as np

from service.engine.closed_form import ClosedFormEngine
from service.scheduler.job import Ask, Budget, Job
from service.scheduler.scheduler import Scheduler

X_SIZE = 8


class Clock:
    """Seconds that pass only when somebody says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def make(clock=None, engine=None, **kwargs):
    """A scheduler with one model "m" that nobody ticks but the test."""
    clock = clock or Clock()
    scheduler = Scheduler(clock=clock, **kwargs)
    scheduler.add_model("m", engine or ClosedFormEngine(jitter=0.05, sleep=clock.sleep))
    return scheduler


def rows_of_x(rows, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, X_SIZE)).astype(np.float32)


def job(rows=1, steps=5, *, seed=0, x=None, model="m", deadline=None, tolerance=None, elastic=False, ask=None, **kwargs):
    seeds = np.arange(seed, seed + rows, dtype=np.uint64)
    if x is None and not kwargs.get("prior") and "z" not in kwargs:
        x = rows_of_x(rows, seed)
    budget = Budget(steps=steps, deadline=deadline, tolerance=tolerance, elastic=elastic)
    return Job(model, seeds, budget, ask or Ask(), x=x, **kwargs)


def run(scheduler, *jobs):
    """Outcomes of jobs that enter together."""
    tickets = [scheduler.enqueue(one) for one in jobs]
    scheduler.drain()
    return [ticket.outcome for ticket in tickets]
