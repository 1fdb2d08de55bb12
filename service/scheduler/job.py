"""What a route asks of the scheduler, and what it gets back. Plain values: no futures, no locks, no HTTP.

A job is one request: R rows of one model, one budget for all of them, one result with R entries in order.
All ELBOs, likelihoods and divergences are in nats per row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.artifact import Arrays


class StopReason(StrEnum):
    """Why a row's refinement ended (architecture.md, section 5)."""

    STEPS = "steps"
    DEADLINE = "deadline"
    CONVERGED = "converged"
    DEGRADED = "degraded"
    NONFINITE = "nonfinite"
    OPTIMUM = "optimum"


@dataclass(frozen=True)
class Budget:
    """How long a row may think. The three limits combine; the first one reached wins.

    Attributes:
        steps: at most this many refinement steps (already resolved: the trained K where the client gave nothing).
        deadline: instant on the scheduler's monotonic clock at which the reply must be ready, in seconds; None = no deadline.
        tolerance: stop when the best measured ELBO rose by less than this many nats over the last 4 steps; None = never.
        elastic: under load, or when the deadline is too tight for all `steps`, fewer steps are acceptable.
    """

    steps: int
    deadline: float | None = None
    tolerance: float | None = None
    elastic: bool = False


@dataclass(frozen=True)
class Ask:
    """What to compute once a row has its posterior.

    Attributes:
        samples: S of the measuring noise for `elbo` (a tolerance raises it to at least 8).
        measure: whether the ELBO is wanted at all (False saves one `score`).
        trace: measure after every step, not only the last.
        importance_samples: if > 0, samples of the importance-weighted log p(x) (`score`), taken in chunks.
        z: number of posterior samples to return.
        mean: decode the posterior mean into the mean of p(x|z).
        x: number of samples of x to return (z ~ q, then x ~ p(x|z)).
    """

    samples: int = 1
    measure: bool = True
    trace: bool = False
    importance_samples: int = 0
    z: int = 0
    mean: bool = False
    x: int = 0


@dataclass(frozen=True)
class StepEvent:
    """Best so far of one row, after a step: told to `Job.on_step` on the engine thread."""

    row: int
    step: int
    elbo: float
    best_step: int
    best_elbo: float
    carry: Arrays
    kl: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Job:
    """One request to the scheduler.

    Attributes:
        model: key of a loaded model, as the repository named it to the scheduler.
        seeds: (R,) uint64, one seed per row.
        x, mask: (R, *X) float32; None only for jobs that draw from the prior or decode given z.
        carry: start from here instead of `init`'s carry₀ (`refine`, or `reconstruct` from a posterior); name -> (R, ...).
        first_step: (R,) index of the first step to be done, so that noise continues where an earlier request stopped.
        prior: draw z from the prior instead of inferring it (`generate`).
        z: decode these instead of inferring them; one (R, D) array per level (`generate` between two posteriors).
        on_step: if given, the row is measured after every step and the best so far is told (events).
    """

    model: str
    seeds: NDArray[np.uint64]
    budget: Budget
    ask: Ask
    x: NDArray[np.float32] | None = None
    mask: NDArray[np.float32] | None = None
    carry: Arrays | None = None
    first_step: NDArray[np.int64] | None = None
    prior: bool = False
    z: Arrays | None = None
    on_step: Callable[[StepEvent], None] | None = None

    @property
    def rows(self) -> int:
        return len(self.seeds)


@dataclass
class Timing:
    """Where the time of a job went, in milliseconds, and how many rows shared its last batch.

    `answered`: when the scheduler was through, on its clock, in seconds.
    """

    queue_ms: float = 0.0
    compute_ms: float = 0.0
    predicted_ms: float = 0.0
    batch_rows: int = 0
    answered: float = math.nan


class Reply(NamedTuple):
    """When the reply to a job left, in seconds of the scheduler's clock.

    `answered`: when the scheduler was through. `ended_by`: the deadline that ended its steps, if one did. `stepped`: whether there
    were any.
    """

    at: float
    answered: float
    ended_by: float | None
    stepped: bool


def reply_of(job: Job, result: JobResult, at: float) -> Reply:
    """What a lane learns from a reply that leaves now."""
    ended_by = job.budget.deadline if StopReason.DEADLINE in result.stop_reason else None
    return Reply(at, result.timing.answered, ended_by, bool(result.steps_used.any()))


@dataclass
class JobResult:
    """Columns over the R rows of a job.

    Attributes:
        elbo, log_likelihood: (R,) of the returned posterior, by the measuring noise (events: by a third stream). NaN if not asked.
        kl: (R, levels).
        steps_used: (R,) steps done by this job. `step`: (R,) first_step + steps_used (events: the step of the best).
        stop_reason: one per row.
        carry: name -> (R, ...), the posterior and whatever else the inference model keeps between steps.
        trace: per row, ELBO after 0 … steps_used steps; None if not asked.
        log_px: (R,) importance-weighted estimate of log p(x), None if not asked.
        z: level -> (R, n, D); mean: (R, X); x: (R, n, X); None if not asked.
    """

    elbo: NDArray[np.float64]
    log_likelihood: NDArray[np.float64]
    kl: NDArray[np.float64]
    steps_used: NDArray[np.int64]
    step: NDArray[np.int64]
    stop_reason: list[StopReason]
    carry: Arrays
    trace: list[list[float]] | None = None
    log_px: NDArray[np.float64] | None = None
    z: dict[str, NDArray[Any]] | None = None
    mean: NDArray[Any] | None = None
    x: NDArray[Any] | None = None
    timing: Timing = field(default_factory=Timing)
