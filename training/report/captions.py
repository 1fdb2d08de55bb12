"""What each figure measures, in words: on which rows, by which samples, with which noise. Numbers come from the data drawn."""

from __future__ import annotations

from collections.abc import Sequence

from training.config import RefinementConfig
from training.report.history import History
from training.report.landscape import Landscape
from training.report.race import LEARNED, Race
from training.report.strips import Strips
from training.report.style import METHODS


def nats(value: float, digits: int = 1) -> str:
    """With a true minus sign."""
    return f"{value:.{digits}f}".replace("-", "−")


def noise(refinement: RefinementConfig) -> str:
    """The noise that drives a step."""
    samples, kind = refinement.samples, "antithetic " if refinement.antithetic else ""
    return f"{samples} {kind}sample{'' if samples == 1 else 's'} per row, fresh at every step"


def race(data: Race, refinement: RefinementConfig, rates: Sequence[float], rows_of: str, threads: int, direct: object = None) -> str:
    last = data.steps[-1]
    error = max(trace.error[-1] for trace in data.traces.values())
    parts = [
        "ELBO against refinement steps, all from the prior and on the same decoder: the learned refiner, trained with "
        f"K = {data.trained_steps} and run to {last}, beside conventional optimisers of λ.",
        f"Mean over the first {data.rows} validation rows of {rows_of}, by {data.samples} fresh samples per row that no method has "
        f"seen; the standard error over rows is at most {error:.2f} nats at the last step, but rows and noise are shared.",
        f"Noise of every method: {noise(refinement)}.",
        f"Each optimiser runs at that learning rate of {', '.join(f'{rate:g}' for rate in rates)} whose ELBO after {last} steps is highest "
        f"on the next {data.tuning_rows} validation rows.",
    ]
    edge = [METHODS[name]["label"] for name, trace in data.traces.items() if trace.rate in (min(rates), max(rates))]
    if edge and len(rates) > 1:
        parts.append(f"The best rate is at the edge of that list for {' and '.join(edge)}.")
    parts.append(
        f"Right: the same curves against time for {data.timing_rows} rows, from the median of {data.timing_rounds} eager steps, the "
        f"methods taking turns, on {threads} CPU thread{'' if threads == 1 else 's'}."
    )
    parts.append(f"The start, λ at the prior ({nats(data.traces[LEARNED].elbo[0])} nats), lies below the axis.")
    if direct is not None:
        parts.append(f"Dashed: a direct encoder ({direct}) with its own decoder, on the same rows.")
    if data.optimum is not None:
        parts.append("Dotted: each row's own optimum, by Adam with fresh noise until nothing is gained.")
    return " ".join(parts)


def race_table(data: Race) -> list[list[str]]:
    """Header and one row per method."""
    shown = sorted({k for k in (1, data.trained_steps, 10, 30, 100, data.steps[-1]) if k in data.steps})
    head = ["method", "learning rate", *(f"ELBO, {k} step{'' if k == 1 else 's'}" for k in shown), "ms per step"]
    rows = [
        [
            METHODS[name]["label"],
            "–" if trace.rate is None else f"{trace.rate:g}",
            *(nats(trace.elbo[data.steps.index(k)], 2) for k in shown),
            f"{trace.step_ms:.2f}",
        ]
        for name, trace in data.traces.items()
    ]
    return [head, *rows]


def strips(data: Strips, refinement: RefinementConfig, by_class: bool, binarised: bool = True) -> str:
    which = f"{', '.join(map(str, data.rows))}" + (" (the first of each class)" if by_class else "")
    drawn = ", binarised" if binarised else ""
    return (
        f"Reconstructions E[x | z = μ] at the posterior mean after so many steps; last column: x{drawn}. Validation rows {which}. "
        f"Below: mean ELBO of these rows by {data.samples} fresh samples. Noise that drives the steps: {noise(refinement)}."
    )


def landscape(data: Landscape, refinement: RefinementConfig, tuning_rows: int, subject: object) -> str:
    spacing, side, last = data.axis[1] - data.axis[0], data.axis[-1], len(data.learned.mu) - 1
    return (
        f"log p(x, z) of validation row {data.row} over a two-dimensional z, on [−{side:g}, {side:g}]² in steps of {spacing:.2g} "
        f"({subject}). Star: the highest grid point. Paths: the posterior mean μ over {last} steps from the prior, of the learned refiner "
        f"(ELBO {nats(data.learned.elbo[-1])} nats at the end) and of gradient ascent on λ ({nats(data.ascent.elbo[-1])} nats) "
        f"at the candidate rate whose ELBO after as many steps is highest on {tuning_rows} other rows; ELBOs by 1,000 samples. "
        f"Noise of both: {noise(refinement)}. Both climb the ELBO of a Gaussian q, not log p(x, z), so μ need not end on the star."
    )


def gradient_by_epoch(data: History, refinement: RefinementConfig) -> str:
    return (
        f"Mean absolute entry of ∂L/∂μ after 0 … {data.steps} refinement steps, over the training rows of each epoch as logged in "
        f"training; both axes logarithmic. Noise: {noise(refinement)}, and part of what is left after the last step is that noise."
        f"{phases(data)}"
    )


def phases(data: History) -> str:
    """What each phase is, where there are several."""
    if len(data.phases) == 1:
        return ""
    told = (f"{name} from epoch {first} (K = {k})" for (name, first), k in zip(data.phases, data.trained_steps, strict=True))
    return f" Dotted lines part the phases: {', '.join(told)}."


def elbo_by_epoch(data: History, direct: object = None) -> str:
    words = (
        f"ELBO on the validation rows by epoch, after 0, 1 and {data.steps} refinement steps, as logged in training: one fresh "
        "sample per row, the same observations and noise at every epoch. The earliest epochs may lie below the upper axis."
        f"{phases(data)}"
    )
    return words if direct is None else f"{words} Dashed: a direct encoder ({direct}) with its own decoder."
