"""What a checkpoint is worth, on validation rows: the figures behind every claim about it. All in nats per row.

- ELBO after 0 … K steps, by at least 20 fresh samples per row that the refinement never saw;
- log p(x), importance-weighted with 5,000 samples from q at the trained K (Burda 2016, as Marino 2018, Table 1);
- the amortization gap L(λ*) − L(λ_K), λ* by Adam on each row's own λ until nothing is gained (Cremer 2018);
- how far the answer depends on the seed of the inference noise, and the time of one step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from models.architecture import OptimiserArchitecture
from models.catalogue import LatentModel, infer_with
from models.gaussian import Posterior
from models.generative.base import Generative
from models.inference.base import Context
from models.objective import Noise, elbo, importance_log_px, log_weights
from models.refinement import refine_once, steps
from training.checkpoint import data_of
from training.config import RunConfig
from training.data.binarise import observe
from training.records import write_json
from training.step import fresh_noise

BINARISE_SEED, REFINE_SEED, MEASURE_SEED = 1, 2, 3
CURVE_STEPS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64)
GAP_STEPS = 16
ADAM_RATES = (0.05, 0.01)


@dataclass(frozen=True)
class Effort:
    """How much to spend: rows and samples of each figure. Without importance or gap rows that figure is left out."""

    rows: int = 5000
    samples: int = 20
    importance_rows: int = 1000
    importance_samples: int = 5000
    gap_rows: int = 500
    gap_samples: int = 1000
    seeds: int = 5
    seed_rows: int = 500


@dataclass
class Evaluation:
    """The figures of one checkpoint, None where there is none to give.

    Attributes:
        elbo: `elbo[k]` belongs to `steps[k]`; `std` is over rows, `error` the standard error of the mean: None of a single row.
        rows: of `elbo`. importance_rows, gap_rows, seed_rows: of `log_px`, of `optimum` and `gap`, of `seed_spread`; 0 = left out.
        facts: what was measured: epoch and sha256 of the weights, name and sha256 of the data.
    """

    name: str
    epochs: int
    rows: int
    samples: int
    steps: list[int]
    elbo: list[float]
    elbo_std: list[float | None]
    elbo_error: list[float | None]
    trained_steps: int
    log_px: float | None = None
    log_px_error: float | None = None
    importance_rows: int = 0
    importance_samples: int = 0
    optimum: float | None = None
    gap_rows: int = 0
    gap: dict[str, float] = field(default_factory=dict)
    seed_spread: float | None = None
    seed_rows: int = 0
    step_ms: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)


class Evaluator:
    """Measures one model on rows of 0/1 (or real) data x (N, X)."""

    def __init__(self, model: LatentModel, run: RunConfig, x: Tensor, rows_at_once: int = 500, quiet: bool = False):
        self.model, self.run, self.x, self.rows_at_once, self.quiet = model, run, x, rows_at_once, quiet
        self.sizes = model.generative.latent_sizes
        self.refines = model.inference.refines

    def noise(self, rows: int, samples: int, generator: torch.Generator) -> Noise:
        """Independent measuring noise."""
        return fresh_noise(self.sizes, rows, samples, False, self.x.device, generator)

    def refining(self, rows: int, generator: torch.Generator) -> Callable[[int], Noise]:
        refinement = self.run.refinement
        return lambda k: fresh_noise(self.sizes, rows, refinement.samples, refinement.antithetic, self.x.device, generator)

    def states(self, x: Tensor, count: int, generator: torch.Generator) -> Any:
        return steps(self.model.generative, self.model.inference, x, torch.ones_like(x), count, self.refining(len(x), generator))

    def measured(self, q: Posterior, x: Tensor, samples: int, generator: torch.Generator) -> Tensor:
        """Each row's ELBO by `samples` fresh samples, (B,)."""
        return measured(self.model.generative, q, x, samples, generator)

    def curve(self, rows: int, samples: int, wanted: Sequence[int]) -> Tensor:
        """Each row's ELBO after each wanted number of steps, (rows, len(wanted))."""
        wanted = list(wanted) if self.refines else [0]
        refine, measure = _generator(self.x, REFINE_SEED), _generator(self.x, MEASURE_SEED)
        columns = []
        for x in tqdm(self.x[:rows].split(self.rows_at_once), desc="ELBO by steps", disable=self.quiet):
            states = enumerate(self.states(x, wanted[-1], refine))
            columns.append(torch.stack([self.measured(state.q, x, samples, measure) for k, state in states if k in wanted], -1))
        return torch.cat(columns)

    def log_px(self, rows: int, samples: int, samples_at_once: int = 250) -> Tensor:
        """Importance-weighted log p(x) of each row from q at the trained K, (rows,)."""
        refine, draw = _generator(self.x, REFINE_SEED), _generator(self.x, MEASURE_SEED + 100)
        values = []
        for x in tqdm(self.x[:rows].split(100), desc="log p(x)", disable=self.quiet):
            *_, state = self.states(x, self.run.refinement.steps, refine)
            weights = []
            for done in range(0, samples, samples_at_once):
                with torch.no_grad():
                    noise = self.noise(len(x), min(samples_at_once, samples - done), draw)
                    weights.append(log_weights(self.model.generative, state.q, x, torch.ones_like(x), noise)[1])
            values.append(importance_log_px(torch.cat(weights, -1)))
        return torch.cat(values)

    def amortization_gap(self, rows: int, samples: int) -> tuple[float, dict[str, float]]:
        """Mean optimum over rows, and the mean gap to it after the trained K and after 16 steps (direct: 0 steps).

        The optimum of a row is the better of Adam from the prior and Adam from λ₁₆; which one is better is decided by
        other samples than those that measure it.
        """
        x = self.x[:rows]
        refine, measure, drive = (_generator(x, seed) for seed in (REFINE_SEED + 50, MEASURE_SEED + 50, 77))
        # the trained K may lie beyond λ₁₆; a direct model has one state only
        kept = list(self.states(x, max(GAP_STEPS, self.run.refinement.steps), refine))
        last = kept[min(GAP_STEPS, len(kept) - 1)]
        prior = self.model.generative.prior_parameters(x)
        candidates = [optimum(self.model.generative, q, x, drive, self.quiet) for q in (prior, last.q)]
        chosen = torch.stack([self._thousand(q, x, samples, measure) for q in candidates]).argmax(0)
        values = torch.stack([self._thousand(q, x, samples, measure) for q in candidates])
        best = values.gather(0, chosen.unsqueeze(0)).squeeze(0)
        wanted = sorted({self.run.refinement.steps, GAP_STEPS}) if self.refines else [0]
        gaps = {str(k): float((best - self._thousand(kept[k].q, x, samples, measure)).mean()) for k in wanted}
        return float(best.mean()), gaps

    def _thousand(self, q: Posterior, x: Tensor, samples: int, generator: torch.Generator) -> Tensor:
        parts = [self.measured(q, x, min(100, samples), generator) for _ in range(max(1, samples // 100))]
        return torch.stack(parts).mean(0)

    def seed_spread(self, rows: int, seeds: int) -> float:
        """Std of a row's ELBO at the trained K over seeds of the refining noise, mean over rows (measured by the same noise)."""
        x = self.x[:rows]
        values = []
        for seed in range(seeds):
            *_, state = self.states(x, self.run.refinement.steps, _generator(x, 1000 + seed))
            values.append(self.measured(state.q, x, 100, _generator(x, MEASURE_SEED)))
        return float(torch.stack(values).std(0).mean())

    def step_ms(self, rows: int = 64, repeats: int = 30) -> float:
        """Median time of one eager step on `rows` rows, in milliseconds."""
        x = self.x[:rows]
        times = []
        began = time.perf_counter()
        for _ in self.states(x, repeats, _generator(x, 0)):
            times.append(time.perf_counter() - began)
            began = time.perf_counter()
        return 1000 * sorted(times)[len(times) // 2]


def measured(generative: Generative, q: Posterior, x: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """Each row's ELBO at q by `samples` fresh samples, (B,) in nats."""
    with torch.no_grad():
        noise = fresh_noise(generative.latent_sizes, len(x), samples, False, x.device, generator)
        return elbo(generative, q, x, torch.ones_like(x), noise).elbo


def optimum(
    generative: Generative, start: Posterior, x: Tensor, generator: torch.Generator, quiet: bool = True, samples: int = 4, patience: int = 4
) -> Posterior:
    """Each row's own λ by Adam with fresh antithetic noise: at each of two learning rates until `patience` 100-sample
    evaluations, 50 steps apart, bring the mean over rows no higher. The second rate starts from the best λ of the first."""
    q = start
    for rate in ADAM_RATES:
        adam = infer_with(generative, OptimiserArchitecture(kind="adam", learning_rate=rate))
        context: Context = {}
        state, mask = adam.init(context, q), torch.ones_like(x)
        best, best_value, waited = q, float(measured(generative, q, x, 100, generator).mean()), 0
        bar = tqdm(desc=f"optimum, rate {rate}", disable=quiet)
        while waited < patience:
            for _ in range(50):
                with torch.no_grad():
                    noise = fresh_noise(generative.latent_sizes, len(x), samples, True, x.device, generator)
                    state, _ = refine_once(generative, adam, x, mask, context, state, noise)
                bar.update()
            value = float(measured(generative, state.q, x, 100, generator).mean())
            best, best_value, waited = (state.q, value, 0) if value > best_value else (best, best_value, waited + 1)
        bar.close()
        q = best
    return q


def evaluate(
    model: LatentModel, run: RunConfig, facts: dict[str, Any], effort: Effort, data_root: str | None, quiet: bool = False
) -> Evaluation:
    """Everything, on the validation rows of the run's data set: for a Bernoulli drawn once, by a fixed seed, for every model.

    Raises:
        DataError: the data are not those that the checkpoint was trained on (`facts`).
    """
    images = data_of(run, facts, data_root)
    device = next(model.parameters()).device
    pixels = torch.as_tensor(images.valid[: effort.rows]).to(device)
    x = observe(pixels, images.kind, run.architecture.generative.likelihood, _generator(pixels, BINARISE_SEED))
    measure = Evaluator(model, run, x, quiet=quiet)
    values = measure.curve(effort.rows, effort.samples, CURVE_STEPS)
    log_px = measure.log_px(effort.importance_rows, effort.importance_samples) if effort.importance_rows else None
    optimum_elbo, gap = measure.amortization_gap(effort.gap_rows, effort.gap_samples) if effort.gap_rows else (None, {})
    std = [_std(column) for column in values.T]
    return Evaluation(
        name=run.name,
        epochs=int(facts.get("epoch") or 0),
        rows=len(x),
        samples=effort.samples,
        steps=list(CURVE_STEPS) if measure.refines else [0],
        elbo=values.mean(0).tolist(),
        elbo_std=std,
        elbo_error=[_error(value, len(x)) for value in std],
        trained_steps=run.refinement.steps if measure.refines else 0,
        log_px=None if log_px is None else float(log_px.mean()),
        log_px_error=None if log_px is None else _error(_std(log_px), len(log_px)),
        importance_rows=0 if log_px is None else len(log_px),
        importance_samples=0 if log_px is None else effort.importance_samples,
        optimum=optimum_elbo,
        gap_rows=min(effort.gap_rows, len(x)),
        gap=gap,
        seed_spread=measure.seed_spread(effort.seed_rows, effort.seeds) if measure.refines else 0.0,
        seed_rows=min(effort.seed_rows, len(x)) if measure.refines else 0,
        step_ms=measure.step_ms() if measure.refines else None,
        facts={
            **{name: facts[name] for name in ("epoch", "weights_sha256") if name in facts},
            "data": images.name,
            "data_sha256": images.sha256,
        },
    )


def _std(values: Tensor) -> float | None:
    return float(values.std()) if len(values) > 1 else None


def _error(std: float | None, rows: int) -> float | None:
    return None if std is None else std / rows**0.5


def save(evaluation: Evaluation, folder: Path) -> Path:
    """Writes evaluation.json beside the weights it is about."""
    return write_json(folder / "evaluation.json", asdict(evaluation))


def table(evaluations: Sequence[Evaluation]) -> str:
    """All checkpoints side by side: one row a figure."""
    wanted = sorted({step for e in evaluations for step in e.steps})
    lines = [("", *(e.name for e in evaluations)), ("epochs", *(str(e.epochs) for e in evaluations))]
    lines += [(f"ELBO, {k} step{'s' if k != 1 else ''}", *(_at(e, k) for e in evaluations)) for k in wanted]
    lines += [
        ("log p(x) (rows)", *(_rows(_mean(e.log_px, e.log_px_error), e.importance_rows) for e in evaluations)),
        ("optimum (rows)", *(_rows(_number(e.optimum), e.gap_rows) for e in evaluations)),
        ("amortization gap", *("; ".join(f"{k} steps {v:.2f}" for k, v in e.gap.items()) or "-" for e in evaluations)),
        ("std over seeds", *(_number(e.seed_spread) for e in evaluations)),
        ("ms a step, 64 rows, eager", *("-" if e.step_ms is None else f"{e.step_ms:.1f}" for e in evaluations)),
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    head = f"{evaluations[0].rows} validation rows, {evaluations[0].samples} fresh samples a row; nats per row, mean ± standard error"
    return "\n".join([head, *("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)])


def _at(evaluation: Evaluation, step: int) -> str:
    if step not in evaluation.steps:
        return "-"
    i = evaluation.steps.index(step)
    return _mean(evaluation.elbo[i], evaluation.elbo_error[i])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _mean(value: float | None, error: float | None) -> str:
    return "-" if value is None else f"{value:.2f} ± {_number(error)}"


def _rows(value: str, rows: int) -> str:
    return f"{value} ({rows})" if rows else value


def _generator(like: Tensor, seed: int) -> torch.Generator:
    return torch.Generator(like.device).manual_seed(seed)
