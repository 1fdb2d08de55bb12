"""What a job may want once a row has its posterior: log p(x) by importance sampling, means, draws of z and of x.

Such work can be a thousand times that of a step (5,000 samples), so it is cut into pieces of some samples of one row. A tick
runs as many pieces as its budget holds, those of one kind and size in one batch. Jobs take turns, the least served first, so a
large job never holds up a small one; up to half of the time goes to the earliest deadlines.

Shapes: R rows of a batch, S samples of a piece, D latent size, X size of x. Log densities in nats.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.artifact import Arrays
from service.engine.base import Engine, Slots
from service.noise import Purpose
from service.scheduler.cost import CostModel
from service.scheduler.job import JobResult
from service.scheduler.noise_ahead import Noise
from service.scheduler.queue import Ticket
from service.scheduler.results import blank
from service.scheduler.rows import RowTable

NO_SLOT = -1
MEASURE, SCORE, MEAN, DRAW = "measure", "score", "mean", "draw"
_PROGRAM = {MEASURE: "score", SCORE: "score", MEAN: "decode", DRAW: "decode"}
_MOST_SAMPLES = 256
"""In one piece: beyond this a larger batch gains nothing and only makes the tick coarser."""


class Piece(NamedTuple):
    kind: str
    first: int
    samples: int


class Part(NamedTuple):
    """One piece of one row."""

    work: _Work
    row: int
    slot: int
    first: int


class _Work:
    """The rows of one job that are in their final stages, and the pieces each of them needs."""

    def __init__(self, ticket: Ticket, pieces: list[Piece]):
        self.ticket, self.pieces = ticket, pieces
        self.rows: deque[tuple[int, int]] = deque()
        self.left: dict[int, int] = {}
        self.scores: dict[tuple[int, str], NDArray[np.float32]] = {}
        """Nats of every sample (S,) by row and kind. They are reduced when all are there and in their order: the sizes of
        pieces follow the clock, and an answer must not."""
        self.kl: dict[int, NDArray[np.float64]] = {}
        """(levels,) by row: the sum over the samples so far."""
        self.queued = False
        self._next = 0

    def next(self) -> tuple[Piece, Part]:
        row, slot = self.rows[0]
        piece = self.pieces[self._next]
        self.left.setdefault(row, len(self.pieces))
        self._next += 1
        if self._next == len(self.pieces):
            self._next = 0
            self.rows.popleft()
        return piece, Part(self, row, slot, piece.first)


class FinalStages:
    """The final stages of one model's rows. `tick` returns the rows that are through."""

    def __init__(self, *, engine: Engine, rows: RowTable, cost: CostModel, noise: Noise, clock: Callable[[], float], tick_s: float):
        self._engine, self._rows, self._cost, self._noise, self._clock, self._tick_s = engine, rows, cost, noise, clock, tick_s
        self._works: dict[int, _Work] = {}
        self._turns: list[tuple[float, int, _Work]] = []
        self._urgent: list[tuple[float, float, int, _Work]] = []
        self._ahead_s = 0.0
        """By how much deadlines had more time than others, while there were both."""
        self._count = itertools.count()
        self._virtual = 0.0

    def __bool__(self) -> bool:
        return bool(self._works)

    def tickets(self) -> list[Ticket]:
        return [work.ticket for work in self._works.values()]

    def needed(self, ticket: Ticket) -> bool:
        """Whether the rows of a job have anything to do here."""
        ask = ticket.job.ask
        weighted = ask.importance_samples and ticket.job.x is not None
        return bool(weighted or ask.z or ask.mean or ask.x or self.measures(ticket))

    def measures(self, ticket: Ticket) -> bool:
        """Whether the ELBO is measured here, in pieces, because it takes more samples than a piece may have."""
        job = ticket.job
        inline = job.ask.trace or job.on_step is not None or job.budget.tolerance is not None
        return job.x is not None and job.ask.measure and not inline and job.ask.samples > _MOST_SAMPLES

    def seconds(self, ticket: Ticket) -> float:
        """Predicted time of a job's final stages, alone."""
        return ticket.rows * sum(self._cost.seconds(_PROGRAM[piece.kind], piece.samples) for piece in self._pieces(ticket))

    def add(self, ticket: Ticket, rows: list[tuple[int, int]]) -> None:
        """Takes (row of the job, slot or NO_SLOT) pairs."""
        work = self._works.get(id(ticket))
        if work is None:
            if ticket.result is None:
                ticket.result = blank(ticket.job, self._engine.card)
            work = self._works[id(ticket)] = _Work(ticket, self._pieces(ticket))
            ticket.served = max(ticket.served, self._virtual)
        work.rows.extend(rows)
        self._queue(work)

    def forget_answered(self) -> None:
        self._works = {key: work for key, work in self._works.items() if work.ticket.outcome is None}

    def tick(self, budget_s: float, fail: Callable[[list[Ticket], Exception], None]) -> list[tuple[Ticket, int, int]]:
        """Runs pieces for about `budget_s` seconds, at least one.

        Args:
            fail: called with the jobs of a batch whose engine call raised, and what it raised.

        Returns:
            (ticket, row, slot) of every row that has all it asked for.
        """
        through: list[tuple[Ticket, int, int]] = []
        for (kind, count), parts in self._choose(budget_s).items():
            alive = [part for part in parts if part.work.ticket.outcome is None]
            if not alive:
                continue
            started = self._clock()
            try:
                self._run(kind, count, alive)
            except Exception as exc:
                fail([part.work.ticket for part in alive], exc)
                continue
            self._cost.observe(_PROGRAM[kind], len(alive) * count, self._clock() - started)
            through.extend(self._complete(alive))
        return [entry for entry in through if entry[0].outcome is None]

    def _pieces(self, ticket: Ticket) -> list[Piece]:
        ask = ticket.job.ask
        draws = max(ask.z, ask.x)
        wanted = [
            (MEASURE, ask.samples if self.measures(ticket) else 0),
            (SCORE, ask.importance_samples if ticket.job.x is not None else 0),
            (MEAN, 1 if ask.mean else 0),
            (DRAW, draws),
        ]
        pieces: list[Piece] = []
        for kind, total in wanted:
            most = self._cost.largest(_PROGRAM[kind], self._tick_s / 4, _MOST_SAMPLES)
            size = 1 << (most.bit_length() - 1)  # a power of two, so that pieces of different jobs share a batch
            pieces.extend(Piece(kind, first, min(size, total - first)) for first in range(0, total, size))
        return pieces

    def _queue(self, work: _Work) -> None:
        if not work.queued:
            work.queued = True
            ticket, count = work.ticket, next(self._count)
            if ticket.deadline < math.inf:
                heapq.heappush(self._urgent, (ticket.deadline, ticket.served, count, work))
            else:
                heapq.heappush(self._turns, (ticket.served, count, work))

    def _choose(self, budget_s: float) -> dict[tuple[str, int], list[Part]]:
        chosen: dict[tuple[str, int], list[Part]] = {}
        spent = 0.0
        while (self._turns or self._urgent) and (spent < budget_s or not chosen):
            both = bool(self._turns and self._urgent)
            urgent = not self._turns or (both and self._ahead_s <= 0)
            work = heapq.heappop(self._urgent)[-1] if urgent else heapq.heappop(self._turns)[-1]
            served = work.ticket.served
            work.queued = False
            if work.ticket.outcome is not None:
                continue
            piece, part = work.next()
            parts = chosen.setdefault((piece.kind, piece.samples), [])
            parts.append(part)
            program, size = _PROGRAM[piece.kind], len(parts) * piece.samples
            seconds = self._cost.seconds(program, size) - self._cost.seconds(program, size - piece.samples)
            spent += seconds
            self._ahead_s = (self._ahead_s + (seconds if urgent else -seconds)) if both else 0.0
            self._virtual = max(self._virtual, served)
            work.ticket.served += piece.samples
            if work.rows:
                self._queue(work)
            if len(parts) >= self._rows.capacity:
                break
        return chosen

    def _complete(self, parts: list[Part]) -> list[tuple[Ticket, int, int]]:
        through = []
        for work, row, slot, _ in parts:
            work.left[row] -= 1
            if work.left[row]:
                continue
            del work.left[row]
            job, result = work.ticket.job, _result(work)
            if result.log_px is not None and job.x is not None:
                result.log_px[row] = _log_mean_exp(work.scores.pop((row, SCORE)))
            if slot != NO_SLOT and self.measures(work.ticket):
                self._rows.log_likelihood[slot] = work.scores.pop((row, MEASURE)).mean(dtype=np.float64)
                self._rows.kl[slot] = work.kl.pop(row) / job.ask.samples
            if not work.rows and not work.left:
                self._works.pop(id(work.ticket), None)
            through.append((work.ticket, row, slot))
        return through

    def _run(self, kind: str, count: int, parts: list[Part]) -> None:
        slots = np.array([part.slot for part in parts], np.intp)
        first = np.array([part.first for part in parts], np.int64)
        if kind in (MEASURE, SCORE):
            purpose = Purpose.MEASURE if kind == MEASURE else Purpose.SCORE
            noise = self._noise.draw("score", self._rows.seed[slots], purpose, (first, count))
            scores = self._engine.run_rows("score", slots, noise)
            self._keep_scores(kind, count, parts, scores)
            return
        seeds = np.array([part.work.ticket.job.seeds[part.row] for part in parts], np.uint64)
        z = self._latents(kind, parts, slots, seeds, (first, count))
        if kind == DRAW:
            self._keep_z(parts, z, count)
            if not any(part.work.ticket.job.ask.x > part.first for part in parts):
                return
        decoded = self._engine.run("decode", z)
        if kind == MEAN:
            for part, mean in zip(parts, decoded["mean"], strict=True):
                kept = _result(part.work).mean
                assert kept is not None
                kept[part.row] = mean[0]
            return
        drawn = self._engine.run("sample_x", {**decoded, **self._noise.draw("sample_x", seeds, Purpose.SAMPLE_X, (first, count))})["x"]
        for part, x in zip(parts, drawn, strict=True):
            wanted, kept = part.work.ticket.job.ask.x, _result(part.work).x
            if kept is not None and part.first < wanted:
                kept[part.row, part.first : part.first + count] = x[: wanted - part.first]

    def _latents(
        self, kind: str, parts: list[Part], slots: Slots, seeds: NDArray[np.uint64], samples: tuple[NDArray[np.int64], int]
    ) -> Arrays:
        """z of every part, (R, S, D) per level: drawn from q (its mean, for means), from the prior, or as the job gave it."""
        card = self._engine.card
        names = [tensor.name for tensor in card.programs["decode"].inputs]
        z = {name: np.empty((len(parts), samples[1], level.size), np.float32) for name, level in zip(names, card.levels, strict=True)}
        job_of = [part.work.ticket.job for part in parts]
        inferred = np.array([job.z is None and not job.prior for job in job_of])
        prior = np.array([job.prior and job.z is None for job in job_of])
        if np.any(inferred):
            where = np.flatnonzero(inferred)
            if kind == MEAN:
                noise = self._noise.zeros("posterior_sample", len(where))
            else:
                noise = self._noise.draw("posterior_sample", seeds[where], Purpose.DRAW, (samples[0][where], samples[1]))
            for name, value in self._engine.run_rows("posterior_sample", slots[where], noise).items():
                z[name][where] = value
        if np.any(prior):
            where = np.flatnonzero(prior)
            noise = self._noise.draw("prior_sample", seeds[where], Purpose.PRIOR, (samples[0][where], samples[1]))
            for name, value in self._engine.run("prior_sample", noise).items():
                z[name][where] = value
        for i, (part, job) in enumerate(zip(parts, job_of, strict=True)):
            if job.z is not None:
                for level, name in zip(card.levels, names, strict=True):
                    z[name][i] = job.z[level.name][part.row]
        return z

    def _keep_scores(self, kind: str, count: int, parts: list[Part], scores: Mapping[str, NDArray[Any]]) -> None:
        for i, (work, row, _, first) in enumerate(parts):
            ask = work.ticket.job.ask
            if (row, kind) not in work.scores:
                work.scores[row, kind] = np.empty(ask.samples if kind == MEASURE else ask.importance_samples, np.float32)
            work.scores[row, kind][first : first + count] = scores["log_likelihood" if kind == MEASURE else "log_weight"][i]
            if kind == MEASURE:
                work.kl[row] = work.kl.get(row, 0.0) + scores["kl"][i].astype(np.float64) * count

    def _keep_z(self, parts: list[Part], z: Arrays, count: int) -> None:
        for i, part in enumerate(parts):
            wanted, kept = part.work.ticket.job.ask.z, _result(part.work).z
            if kept is not None and part.first < wanted:
                for level, value in zip(self._engine.card.levels, z.values(), strict=True):
                    kept[level.name][part.row, part.first : part.first + count] = value[i, : wanted - part.first]


def _result(work: _Work) -> JobResult:
    result = work.ticket.result
    assert result is not None, "allocated by FinalStages.add"
    return result


def _log_mean_exp(log_weight: NDArray[np.float32]) -> float:
    """log 1/S Σ exp of S log weights: log p(x) in nats (Burda et al. 2016, eq. 8); −∞ if every one of them is."""
    wide = log_weight.astype(np.float64)
    most = wide.max()
    if not np.isfinite(most):
        return float(most)
    return float(most + np.log(np.exp(wide - most).mean()))
