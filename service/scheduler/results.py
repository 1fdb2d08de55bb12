"""The columns of a job's result: allocated, filled row by row or in slices, and completed with where the time went.

R rows of the job, L levels, D latent size, X size of x.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.artifact import Arrays, Card
from service.scheduler.job import Job, JobResult, StopReason


def blank(job: Job, card: Card) -> JobResult:
    """A result with room for R rows and for whatever the job asks."""
    rows, ask = job.rows, job.ask
    decoded = {tensor.name: _sizes(tensor.shape[2:]) for tensor in card.programs["decode"].outputs} if "decode" in card.programs else {}
    inferred = job.z is None and not job.prior
    return JobResult(
        elbo=np.full(rows, np.nan),
        log_likelihood=np.full(rows, np.nan),
        kl=np.full((rows, len(card.levels)), np.nan),
        steps_used=np.zeros(rows, np.int64),
        step=np.zeros(rows, np.int64),
        stop_reason=[StopReason.STEPS] * rows,
        carry={t.name: np.zeros((rows, *_sizes(t.shape[1:])), t.dtype) for t in card.carry} if inferred else {},
        trace=[[] for _ in range(rows)] if ask.trace else None,
        log_px=np.full(rows, np.nan) if ask.importance_samples else None,
        z={level.name: np.zeros((rows, ask.z, level.size), np.float32) for level in card.levels} if ask.z else None,
        mean=np.zeros((rows, *decoded["mean"]), np.float32) if ask.mean else None,
        x=np.zeros((rows, ask.x, *decoded["mean"]), np.float32) if ask.x else None,
    )


class Finished:
    """The posteriors of some finished rows, as columns over these rows (of several jobs)."""

    def __init__(
        self,
        *,
        log_likelihood: NDArray[np.float64],
        kl: NDArray[np.float64],
        steps_used: NDArray[np.int64],
        step: NDArray[np.int64],
        stop_reason: list[StopReason],
        carry: Arrays,
        traces: NDArray[np.float64],
        traced: NDArray[np.bool_],
    ):
        self.log_likelihood, self.kl, self.steps_used, self.step = log_likelihood, kl, steps_used, step
        self.stop_reason, self.carry, self._traces, self._traced = stop_reason, carry, traces, traced
        self.elbo = log_likelihood - kl.sum(axis=1)

    def alone(self, i: int, trace: bool) -> JobResult:
        """The result of a job whose only row is the i-th of these, without copying."""
        part = slice(i, i + 1)
        return JobResult(
            elbo=self.elbo[part],
            log_likelihood=self.log_likelihood[part],
            kl=self.kl[part],
            steps_used=self.steps_used[part],
            step=self.step[part],
            stop_reason=[self.stop_reason[i]],
            carry={name: value[part] for name, value in self.carry.items()},
            trace=[self.trace(i)] if trace else None,
        )

    def write(self, result: JobResult, rows: NDArray[np.int64], which: list[int]) -> None:
        """Writes those of our rows whose index is in `which` to `rows` of a job's result."""
        result.elbo[rows], result.log_likelihood[rows], result.kl[rows] = self.elbo[which], self.log_likelihood[which], self.kl[which]
        result.steps_used[rows], result.step[rows] = self.steps_used[which], self.step[which]
        for name, value in self.carry.items():
            result.carry[name][rows] = value[which]
        for row, i in zip(rows.tolist(), which, strict=True):
            result.stop_reason[row] = self.stop_reason[i]
            if result.trace is not None:
                result.trace[row] = self.trace(i)

    def trace(self, i: int) -> list[float]:
        """ELBO after 0 … steps_used steps; empty for a row that was not measured at every step."""
        values: list[float] = self._traces[i, : int(self.steps_used[i]) + 1].tolist() if self._traced[i] else []
        return values


def _sizes(shape: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(int(size) for size in shape)
