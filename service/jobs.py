"""From a validated body to a Job: what needs the model's card or the server's limits to be judged is judged here.

Shapes: R rows, X shape of x, D latent size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.artifact import Arrays, Card
from service.arrays import Float32, read_mask, read_rows
from service.body import describe, whole
from service.errors import InvalidInput
from service.posterior import read_posteriors
from service.repository import ServedModel
from service.scheduler.job import Ask, Budget, Job, StepEvent
from service.schemas import EncodeBody, GenerateBody, ReconstructBody, RefineBody, ScoreBody

MAX_DIRECT_STEPS = 128
"""What a direct model accepts as `steps`, though it uses none: the same clients work with both kinds."""
MAX_REPLY_NUMBERS = 2**24
QUANTILE_SAMPLES = 8
"""Measuring samples of a score's `elbo`: its quantile is among single-row ELBOs, so more of them would only narrow it."""
MAX_EVENTS = 2**14
"""Rows × steps of one event stream: what waits in memory for a slow reader."""


SAMPLES_PER_STEP = 8
"""So many samples, measured or drawn for a row, are charged like one refinement step of it."""


@dataclass(frozen=True)
class Limits:
    """What one request may ask of this server (settings.py has the defaults)."""

    max_body_bytes: int
    max_rows: int
    max_samples: int
    max_importance_samples: int
    max_deadline_ms: float
    max_message_bytes: int = 2**20
    stream_idle_s: float = 60.0
    max_sequences: int = 512
    drain_s: float = 10.0


def encode_job(body: EncodeBody, model: ServedModel, limits: Limits, arrival: float) -> Job:
    """`arrival`: when the request came, on the scheduler's clock; the deadline counts from there."""
    x, mask = _read_inputs(body.inputs, body.mask, model.card, limits)
    return Job(
        model=model.key,
        seeds=_seeds(body.seed, len(x)),
        budget=_budget(body, model.card, limits, arrival),
        ask=_ask(body, model.card, len(x), limits),
        x=x,
        mask=mask,
    )


def refine_job(body: RefineBody, model: ServedModel, limits: Limits, arrival: float) -> Job:
    x, mask = _read_inputs(body.inputs, body.mask, model.card, limits)
    carry, first_step = read_posteriors(
        body.posterior, "posterior", model.card, model.sha256, limits.max_rows, needs_carry=model.card.iterative
    )
    if len(first_step) != len(x):
        raise InvalidInput.at("posterior", f"has {len(first_step)} entries for {len(x)} rows of inputs: send one per row")
    return Job(
        model=model.key,
        seeds=_seeds(body.seed, len(x)),
        budget=_budget(body, model.card, limits, arrival),
        ask=_ask(body, model.card, len(x), limits),
        x=x,
        mask=mask,
        carry=carry,
        first_step=first_step,
    )


def reconstruct_job(body: ReconstructBody, model: ServedModel, limits: Limits, arrival: float) -> Job:
    if (body.inputs is None) == (body.posterior is None):
        raise InvalidInput.at("inputs", "give either inputs (they are encoded first) or posterior")
    budget = _budget(body, model.card, limits, arrival)
    if body.inputs is not None:
        x, mask = _read_inputs(body.inputs, body.mask, model.card, limits)
        ask = Ask(measure=False, mean=True, x=_draws(body.samples, len(x), model.card, limits))
        return Job(model=model.key, seeds=_seeds(body.seed, len(x)), budget=budget, ask=ask, x=x, mask=mask)
    for field in ("mask", "steps", "tolerance"):
        if getattr(body, field) is not None:
            raise InvalidInput.at(field, "has no meaning when posterior is given: refine goes on from a posterior")
    carry, first_step = read_posteriors(body.posterior, "posterior", model.card, model.sha256, limits.max_rows, needs_carry=False)
    rows = len(first_step)
    return Job(
        model=model.key,
        seeds=_seeds(body.seed, rows),
        budget=Budget(steps=0, deadline=budget.deadline),
        ask=Ask(measure=False, mean=True, x=_draws(body.samples, rows, model.card, limits)),
        carry=carry,
        first_step=first_step,
    )


def score_job(body: ScoreBody, model: ServedModel, limits: Limits, arrival: float) -> Job:
    x, mask = _read_inputs(body.inputs, body.mask, model.card, limits)
    samples = _at_most("samples", body.samples, limits.max_importance_samples)
    return Job(
        model=model.key,
        seeds=_seeds(body.seed, len(x)),
        budget=_budget(body, model.card, limits, arrival),
        ask=Ask(samples=min(samples, QUANTILE_SAMPLES), importance_samples=samples),
        x=x,
        mask=mask,
    )


def generate_job(body: GenerateBody, model: ServedModel, limits: Limits) -> Job:
    count = _at_most("count", body.count, limits.max_rows)
    ask = Ask(measure=False, mean=True, x=_draws(body.samples, count, model.card, limits))
    seeds = spread(body.seed, count)
    budget = Budget(steps=0)
    if body.between is None:
        return Job(model=model.key, seeds=seeds, budget=budget, ask=ask, prior=True)
    z = _between(body.between, count, model, limits)
    return Job(model=model.key, seeds=seeds, budget=budget, ask=ask, z=z)


def work_of(job: Job) -> int:
    """What a job costs its caller's quota, in row-steps: one for the start, one for each step it may take, and its samples."""
    samples = job.ask.samples + job.ask.importance_samples + job.ask.x + job.ask.z
    return job.rows * (1 + job.budget.steps + samples // SAMPLES_PER_STEP)


def with_events(job: Job, on_step: Callable[[StepEvent], None]) -> Job:
    """The same job, telling `on_step` the best so far after every step."""
    events = job.rows * (1 + job.budget.steps)
    if events > MAX_EVENTS:
        message = f"{job.rows} rows of {job.budget.steps} steps are {events} events, a stream has at most {MAX_EVENTS}"
        raise InvalidInput.at("inputs", message)
    return replace(job, on_step=on_step, ask=replace(job.ask, measure=True))


def _read_inputs(inputs: Any, mask: Any, card: Card, limits: Limits) -> tuple[Float32, Float32]:
    x = read_rows(inputs, "inputs", card.x, limits.max_rows)
    # without a mask a view of a single 1: nothing is made for what is the usual case
    return x, np.broadcast_to(np.float32(1), x.shape) if mask is None else read_mask(mask, card.x, len(x))


def _budget(body: EncodeBody | ReconstructBody | ScoreBody, card: Card, limits: Limits, arrival: float) -> Budget:
    """The three limits with their defaults: nothing given is the trained K; a deadline or tolerance alone goes up to K_max."""
    bounded = body.deadline_ms is not None or body.tolerance is not None
    most = card.max_steps if card.iterative else MAX_DIRECT_STEPS
    steps = body.steps
    if steps is None:
        steps = card.max_steps if bounded else card.trained_steps
    elif steps > most:
        raise InvalidInput.at("steps", f"{steps} is more than this model's maximum of {most}")
    deadline = None
    if body.deadline_ms is not None:
        if body.deadline_ms > limits.max_deadline_ms:
            raise InvalidInput.at("deadline_ms", f"{body.deadline_ms:g} is more than this server's maximum of {limits.max_deadline_ms:g}")
        deadline = arrival + body.deadline_ms / 1e3
    elastic = bounded if body.elastic is None else body.elastic
    return Budget(steps=steps, deadline=deadline, tolerance=body.tolerance, elastic=elastic)


def _ask(body: EncodeBody, card: Card, rows: int, limits: Limits) -> Ask:
    samples = _at_most("samples", body.samples, limits.max_samples)
    z = samples if "z" in body.parts else 0
    _check_reply_size(rows * z * sum(level.size for level in card.levels))
    return Ask(
        samples=samples,
        measure=bool({"elbo", "posterior", "carry", "trace"} & set(body.parts)),
        trace="trace" in body.parts,
        z=z,
        mean="reconstruction" in body.parts,
    )


def _draws(samples: int, rows: int, card: Card, limits: Limits) -> int:
    _check_reply_size(rows * (1 + _at_most("samples", samples, limits.max_samples)) * card.x.size)
    return samples


def _check_reply_size(numbers: int) -> None:
    if numbers > MAX_REPLY_NUMBERS:
        message = f"asks for a reply of {numbers} numbers, at most {MAX_REPLY_NUMBERS} fit: ask for fewer rows or samples at a time"
        raise InvalidInput.at("samples", message)


def _at_most(field: str, value: int, limit: int) -> int:
    if value > limit:
        raise InvalidInput.at(field, f"{value} is more than this server's maximum of {limit}")
    return value


def _seeds(seed: Any, rows: int) -> NDArray[np.uint64]:
    """(R,) one seed per row: the same for all, or as listed."""
    given = [whole(value) for value in seed] if isinstance(seed, list) else [whole(seed)]
    for index, value in enumerate(given):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
            path = f"seed[{index}]" if isinstance(seed, list) else "seed"
            raise InvalidInput.at(path, f"must be a whole number from 0 to 2**64 - 1, not {describe(value)}")
    if not isinstance(seed, list):
        return np.full(rows, given[0], np.uint64)
    if len(given) != rows:
        raise InvalidInput.at("seed", f"has {len(given)} entries for {rows} rows: send one integer for all, or one per row")
    return np.asarray(given, np.uint64)


def spread(seed: int, count: int) -> NDArray[np.uint64]:
    """`count` seeds from one: seed ⊕ mix(i), where mix is splitmix64's bijection (mix(0) = 0, so one draw uses the seed itself).

    The first n of them do not depend on `count`, and neighbouring seeds share no draw.
    """
    mixed = np.arange(count, dtype=np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return np.asarray(np.uint64(seed) ^ mixed ^ (mixed >> np.uint64(31)))


def _between(value: Any, count: int, model: ServedModel, limits: Limits) -> Arrays:
    """(count, D) per level: points on the line between the two posterior means, ends included."""
    if not isinstance(value, list) or len(value) != 2:
        given = f"{len(value)} entries" if isinstance(value, list) else describe(value)
        raise InvalidInput.at("between", f"must be a list of two posteriors as replies returned them, not {given}")
    carry, _ = read_posteriors(value, "between", model.card, model.sha256, limits.max_rows, needs_carry=False)
    t = np.linspace(0.0, 1.0, count, dtype=np.float32)[:, None]
    means = {level.name: carry[level.parameters["mu"]] for level in model.card.levels}
    return {name: ((1 - t) * mu[0] + t * mu[1]).astype(np.float32) for name, mu in means.items()}
