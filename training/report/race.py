"""ELBO against steps and against time: the learned refiner beside conventional optimisers on the same decoder (Marino 2018, Fig. 4).

Every method starts at the prior and gets, at every step, fresh noise of the kind and number of samples that the model was
trained with: the same draws for all. The ELBO is measured by other samples. Each optimiser runs at the learning rate, out
of `RATES`, whose ELBO after the last step is highest on rows that are not plotted.

Shapes: B rows, X size of x.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from tqdm import tqdm

from models.architecture import OptimiserArchitecture
from models.catalogue import LatentModel, infer_with
from models.inference.base import Inference, State
from models.objective import Noise
from models.refinement import begin, refine_once, steps
from training.config import RefinementConfig
from training.evaluate import MEASURE_SEED, REFINE_SEED, measured, optimum
from training.step import fresh_noise

LEARNED = "learned"
OPTIMISERS = ("sgd", "momentum", "rmsprop", "adam")
RATES = (0.5, 0.4, 0.3, 0.2, 0.1, 0.01, 0.001)


@dataclass(frozen=True)
class RaceEffort:
    """How much to spend. `rows` are plotted, the `tuning_rows` after them choose the learning rates."""

    rows: int = 500
    tuning_rows: int = 100
    steps: int = 300
    samples: int = 20
    rates: tuple[float, ...] = RATES
    timing_rows: int = 64
    timing_rounds: int = 40
    with_optimum: bool = False


@dataclass(frozen=True)
class Trace:
    """One method's curve: mean ELBO over rows after `Race.steps`, in nats.

    Attributes:
        error: standard error of that mean over rows. Rows and noise are shared, so differences between methods are known far better.
        rate: learning rate, None for the learned refiner; `candidates`: the ELBO each rate reached on the tuning rows.
        step_ms, init_ms: median time of one step, and of λ₀ with the context, for `Race.timing_rows` rows.
    """

    elbo: list[float]
    error: list[float]
    step_ms: float
    init_ms: float
    rate: float | None = None
    candidates: dict[str, float] | None = None


@dataclass(frozen=True)
class Race:
    """All curves. `direct` and `optimum` are mean ELBOs of the same rows, None if not measured."""

    steps: list[int]
    trained_steps: int
    rows: int
    tuning_rows: int
    samples: int
    timing_rows: int
    timing_rounds: int
    traces: dict[str, Trace]
    direct: float | None = None
    optimum: float | None = None


class Refiner:
    """One way to refine the posteriors of a generative model, with the noise every rival gets too."""

    def __init__(self, model: LatentModel, inference: Inference, refinement: RefinementConfig):
        self.generative, self.inference, self.refinement = model.generative, inference, refinement

    def states(self, x: Tensor, count: int, seed: int = REFINE_SEED) -> Iterator[State]:
        """λ after 0 … `count` steps of every row of x (B, X)."""
        generator = torch.Generator(x.device).manual_seed(seed)
        return steps(self.generative, self.inference, x, torch.ones_like(x), count, lambda _: self.noise(x, generator))

    def noise(self, x: Tensor, generator: torch.Generator) -> Noise:
        kind = self.refinement
        return fresh_noise(self.generative.latent_sizes, len(x), kind.samples, kind.antithetic, x.device, generator)

    def curve(self, x: Tensor, wanted: Sequence[int], samples: int, label: str, quiet: bool) -> Tensor:
        """Each row's ELBO after each wanted number of steps, by fresh samples: (B, len(wanted))."""
        generator = torch.Generator(x.device).manual_seed(MEASURE_SEED)
        bar = tqdm(self.states(x, wanted[-1]), total=wanted[-1] + 1, desc=label, leave=False, disable=quiet)
        chosen = set(wanted)
        values = [measured(self.generative, state.q, x, samples, generator) for k, state in enumerate(bar) if k in chosen]
        return torch.stack(values, -1)


def optimiser(model: LatentModel, kind: str, rate: float, refinement: RefinementConfig) -> Refiner:
    """A conventional optimiser on λ, for the decoder of `model`."""
    return Refiner(model, infer_with(model.generative, OptimiserArchitecture(kind=kind, learning_rate=rate)), refinement)  # type: ignore[arg-type]


def search_rate(
    model: LatentModel,
    kind: str,
    refinement: RefinementConfig,
    x: Tensor,
    count: int,
    samples: int,
    rates: Sequence[float],
    quiet: bool = False,
) -> tuple[float, dict[str, float]]:
    """The learning rate with the highest mean ELBO after `count` steps on x (B, X), and what every candidate reached, in nats.

    A rate at which the ELBO is not finite counts as −∞: it has diverged.
    """
    reached = {}
    for rate in tqdm(rates, desc=f"{kind}: learning rates", leave=False, disable=quiet):
        *_, last = optimiser(model, kind, rate, refinement).states(x, count, REFINE_SEED + 1)
        value = float(measured(model.generative, last.q, x, samples, torch.Generator(x.device).manual_seed(MEASURE_SEED + 1)).mean())
        reached[rate] = value if math.isfinite(value) else -math.inf
    best = max(reached, key=lambda rate: reached[rate])
    return best, {f"{rate:g}": value for rate, value in reached.items()}


def wanted_steps(last: int) -> list[int]:
    """Steps at which to measure: all to 10, then about 12 per factor of ten, and the last."""
    spaced = (round(10 ** (1 + i / 12)) for i in range(1, 60))
    return sorted({*range(min(10, last) + 1), *(k for k in spaced if k < last), last})


def race(
    model: LatentModel, refinement: RefinementConfig, x: Tensor, effort: RaceEffort, direct: LatentModel | None = None, quiet: bool = False
) -> Race:
    """Runs every method. x (B, X) holds the rows to plot and, after them, those that choose the learning rates.

    Raises:
        ValueError: x has no rows left to choose the learning rates on.
    """
    shown, tuning = x[: effort.rows], x[effort.rows : effort.rows + effort.tuning_rows]
    if not len(tuning):
        raise ValueError(f"rows: {effort.rows} of {len(x)} validation rows leave none to choose learning rates on")
    wanted = wanted_steps(effort.steps)
    refiners = {LEARNED: Refiner(model, model.inference, refinement)}
    searched: dict[str, tuple[float, dict[str, float]]] = {}
    for kind in OPTIMISERS:
        searched[kind] = search_rate(model, kind, refinement, tuning, effort.steps, effort.samples, effort.rates, quiet)
        refiners[kind] = optimiser(model, kind, searched[kind][0], refinement)
    times = step_times(refiners, shown[: effort.timing_rows], effort.timing_rounds)
    traces = {}
    for name, refiner in refiners.items():
        values = refiner.curve(shown, wanted, effort.samples, name, quiet)
        error = values.std(0) / math.sqrt(len(values)) if len(values) > 1 else torch.zeros(len(wanted))
        init_ms, step_ms = times[name]
        traces[name] = Trace(values.mean(0).tolist(), error.tolist(), step_ms, init_ms, *searched.get(name, (None, None)))
    return Race(
        wanted,
        refinement.steps,
        len(shown),
        len(tuning),
        effort.samples,
        len(shown[: effort.timing_rows]),
        effort.timing_rounds,
        traces,
        direct=_direct(direct, shown, effort.samples) if direct else None,
        optimum=_optimum(model, shown, quiet) if effort.with_optimum else None,
    )


def step_times(refiners: dict[str, Refiner], x: Tensor, rounds: int, warm_up: int = 3) -> dict[str, tuple[float, float]]:
    """(λ₀, one step) of each method on the rows of x, medians in milliseconds, eager.

    Measured in turn: each round takes one step of every method, so a machine that slows down slows all of them alike.
    """
    mask = torch.ones_like(x)
    generator = torch.Generator(x.device).manual_seed(0)
    init: dict[str, list[float]] = {name: [] for name in refiners}
    step: dict[str, list[float]] = {name: [] for name in refiners}
    with torch.no_grad():
        states = {name: begin(r.generative, r.inference, x, mask)[0] for name, r in refiners.items()}
        for _ in range(warm_up + rounds):
            for name, refiner in refiners.items():
                stamps = [_now(x)]
                _, context = begin(refiner.generative, refiner.inference, x, mask)
                stamps.append(_now(x))
                noise = refiner.noise(x, generator)
                states[name], _ = refine_once(refiner.generative, refiner.inference, x, mask, context, states[name], noise)
                stamps.append(_now(x))
                for times, (before, after) in zip((init[name], step[name]), pairwise(stamps), strict=True):
                    times.append(1000 * (after - before))
    return {name: (_median(init[name][warm_up:]), _median(step[name][warm_up:])) for name in refiners}


def _direct(direct: LatentModel, x: Tensor, samples: int) -> float:
    state, _ = begin(direct.generative, direct.inference, x, torch.ones_like(x))
    return float(measured(direct.generative, state.q, x, samples, torch.Generator(x.device).manual_seed(MEASURE_SEED)).mean())


def _optimum(model: LatentModel, x: Tensor, quiet: bool) -> float:
    generator = torch.Generator(x.device).manual_seed(REFINE_SEED + 2)
    q = optimum(model.generative, model.generative.prior_parameters(x), x, generator, quiet)
    return float(measured(model.generative, q, x, 100, torch.Generator(x.device).manual_seed(MEASURE_SEED)).mean())


def _now(x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
