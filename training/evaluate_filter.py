"""What a sequence model is worth, on whole validation (or test) sequences. All in nats; free energies are −ELBO.

Conventions differ between papers by more than methods do, so all of them are given:
- frames weighted alike (total nats over all scored frames), or sequences alike (mean over sequences of their own mean);
- the first frame scored, or only initialising; divided by the frames scored, or, as published by Marino 2018, by T (T − 1 scored);
- audio by density of standardised samples, and by the mass of 16-bit intervals (`quantised`), which silence cannot inflate;
- beside the one-sample ELBO a bound of N particles with resampling (FIVO, Maddison 2017), which is tighter.

B sequences, T frames, K steps, N particles, D latent size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from models.architecture import FilterArchitecture, SRNNArchitecture, VRNNArchitecture
from models.catalogue import FilterModel, build_filter
from models.filtering import filter_sequence, random_noise
from models.generative.filter import FilterState
from training.checkpoint import data_of
from training.data.errors import DataError
from training.data.sequence_batches import ResidentSequences, evaluation_batches
from training.filter_bounds import amortization_gap, fivo_bound
from training.records import write_json
from training.sequence_config import SequenceRunConfig

SEED = 5
PIECE = 200
"""Frames filtered at a time: what is kept of each frame of a long piece would not fit the memory."""


@dataclass(frozen=True)
class FilterEffort:
    """How much to spend.

    Attributes:
        steps: numbers of steps per frame to evaluate beside the trained one.
        seeds: of the noise, for the spread. sequences: the first so many of the split (None = all).
        particles: of the bound, on the first `particle_sequences`.
        gap_frames: frames of the amortization gap, spread over the first `gap_span` frames of the first `gap_sequences`.
    """

    steps: tuple[int, ...] = ()
    seeds: int = 3
    sequences: int | None = None
    particles: int = 16
    particle_sequences: int | None = 32
    gap_sequences: int = 32
    gap_frames: int = 6
    gap_span: int = 30
    rows_at_once: int = 128


@dataclass(frozen=True)
class Nats:
    """Mean ELBO per frame under each convention.

    Attributes:
        frames, sequences: first frame scored; frames weighted alike, sequences weighted alike.
        later_frames, later_sequences: first frame only initialising, divided by the frames scored.
            None, both, where every sequence has one frame only.
        published: first frame only initialising, divided by T, sequences weighted alike (Marino 2018's code).
    """

    frames: float
    sequences: float
    later_frames: float | None
    later_sequences: float | None
    published: float

    @staticmethod
    def of(values: Tensor, mask: Tensor) -> Nats:
        """From ELBOs (B, T) and which of them are frames."""
        values, mask = (values * mask).double(), mask.double()
        lengths, totals = mask.sum(1), values.sum(1)
        later, scored = totals - values[:, 0], lengths - 1
        # a sequence of one frame has none left to score
        longer = scored > 0
        return Nats(
            frames=float(totals.sum() / lengths.sum()),
            sequences=float((totals / lengths).mean()),
            later_frames=float(later.sum() / scored.sum()) if longer.any() else None,
            later_sequences=float((later[longer] / scored[longer]).mean()) if longer.any() else None,
            published=float((later / lengths).mean()),
        )


@dataclass(frozen=True)
class Filtering:
    """One pass over all sequences, in their own order: ELBO of every frame and which are frames, (B, T) float64; means per frame."""

    elbo: Tensor
    mask: Tensor
    trace: list[float]
    kl: float

    @property
    def nats(self) -> Nats:
        return Nats.of(self.elbo, self.mask)


@dataclass
class FilterEvaluation:
    """The figures of one checkpoint on one split.

    Attributes:
        elbo: at the trained K. trace: mean ELBO per frame after 0 … K steps, all frames alike. kl: per frame.
        other_steps: the same with so many steps at every frame instead.
        spread: standard deviation of elbo.frames over evaluation seeds.
        bound: FIVO per frame with `particles` particles, and the one-sample ELBO of the same sequences.
        quantised: by mass, where the likelihood is a density.
        bound_sequences, gap_sequences: of how many sequences these two are, 0 where there is no gap.
        gap: mean amortization gap per frame (training/filter_bounds.py).
        facts: what was measured: epoch and sha256 of the weights, name and sha256 of the data.
    """

    name: str
    split: str
    epochs: int
    frames: int
    sequences: int
    steps: int
    elbo: Nats
    trace: list[float]
    kl: float
    spread: float
    bound: float
    bound_elbo: float
    particles: int
    bound_sequences: int = 0
    gap: float | None = None
    gap_sequences: int = 0
    quantised: Nats | None = None
    other_steps: dict[str, Nats] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


class FilterEvaluator:
    """Measures one model on one set of sequences."""

    def __init__(self, model: FilterModel, run: SequenceRunConfig, sequences: ResidentSequences, effort: FilterEffort, quiet: bool = False):
        self.model, self.sequences, self.effort, self.quiet = model, sequences, effort, quiet
        self.refines = model.inference.refines
        self.steps = run.refinement.steps if self.refines else 0
        self.samples = run.refinement.samples
        (self.latent,) = model.generative.latent_sizes

    def filtered(self, seed: int = SEED, steps: int | None = None) -> Filtering:
        """Filters every sequence with `steps` steps (the trained K) at every frame."""
        steps = self.steps if steps is None else steps
        generator = torch.Generator().manual_seed(seed)
        shape = (len(self.sequences), int(self.sequences.cpu_lengths.max()))
        values, mask = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
        trace, kl = torch.zeros(steps + 1, dtype=torch.float64), 0.0
        batches = evaluation_batches(self.sequences, min(self.effort.rows_at_once, len(self.sequences)))
        for batch in tqdm(batches, desc=f"{steps} steps a frame", unit="batch", disable=self.quiet, leave=False):
            state: FilterState | None = None
            for first in range(0, batch.x.shape[1], PIECE):
                x, seen = batch.x[:, first : first + PIECE], batch.mask[:, first : first + PIECE]
                noise = random_noise(generator, len(x), self.latent, steps, self.samples)
                entries = seen[..., None].expand_as(x)
                filtered = filter_sequence(self.model.generative, self.model.inference, x, entries, noise, state)
                state = filtered.state
                piece = slice(first, first + x.shape[1])
                values[batch.sequence, piece] = (filtered.elbo * seen).double()
                mask[batch.sequence, piece] = seen.double()
                trace += (filtered.trace * seen[..., None]).sum((0, 1)).double()
                kl += float((filtered.kl * seen).sum())
        return Filtering(values, mask, (trace / mask.sum()).tolist(), kl / float(mask.sum()))

    def bound(self) -> tuple[float, int]:
        """FIVO per frame, all frames alike, of the first sequences, and how many they were."""
        count = min(self.effort.particle_sequences or len(self.sequences), len(self.sequences))
        x, mask = self._first(count, None)
        total = fivo_bound(self.model, x, mask, self.steps, self.effort.particles, torch.Generator().manual_seed(SEED))
        return float(total.sum() / mask.sum()), count

    def gap(self) -> float:
        """Mean amortization gap per frame at the trained K."""
        effort = self.effort
        x, mask = self._first(effort.gap_sequences, effort.gap_span)
        wanted = {int(t) for t in torch.linspace(0, x.shape[1] - 1, effort.gap_frames).round()}
        return amortization_gap(self.model, x, mask, self.steps, self.samples, wanted, torch.Generator().manual_seed(SEED))

    def _first(self, sequences: int, frames: int | None) -> tuple[Tensor, Tensor]:
        """The first frames of the first sequences, (B, T, X) and which are frames (B, T)."""
        index = torch.arange(min(sequences, len(self.sequences)))
        longest = int(self.sequences.cpu_lengths[: len(index)].max())
        x, mask, _ = self.sequences.gather(index, torch.zeros_like(index), min(longest, frames or longest))
        return x, mask


def evaluate_filter(
    model: FilterModel,
    run: SequenceRunConfig,
    facts: dict[str, Any],
    effort: FilterEffort | None = None,
    *,
    split: str = "valid",
    data_root: str | None = None,
    quiet: bool = False,
) -> FilterEvaluation:
    """Measures a checkpoint on a split of its own data.

    Raises:
        DataError: the data set has no such split, or is not the one that the checkpoint was trained on (`facts`).
    """
    effort = effort or FilterEffort()
    sequences = data_of(run, facts, data_root)
    if split not in sequences.splits:
        raise DataError(f"--split {split}: {run.data.name} keeps {', '.join(sequences.splits)}")
    part = sequences.splits[split]
    resident = ResidentSequences.of(part if effort.sequences is None else part[: effort.sequences])
    measure = FilterEvaluator(model, run, resident, effort, quiet)
    filtered = measure.filtered()
    means = [filtered.nats.frames, *(measure.filtered(SEED + i).nats.frames for i in range(1, effort.seeds))]
    bound, bounded = measure.bound()
    gap = measure.gap() if measure.refines and effort.gap_frames else None
    density = getattr(run.architecture.generative, "likelihood", None) == "gaussian"
    return FilterEvaluation(
        name=run.name,
        split=split,
        epochs=int(facts.get("epoch") or 0),
        frames=int(filtered.mask.sum()),
        sequences=len(filtered.mask),
        steps=measure.steps,
        elbo=filtered.nats,
        trace=filtered.trace,
        kl=filtered.kl,
        spread=float(torch.tensor(means).std()) if effort.seeds > 1 else 0.0,
        bound=bound,
        bound_elbo=Nats.of(filtered.elbo[:bounded], filtered.mask[:bounded]).frames,
        particles=effort.particles,
        bound_sequences=bounded,
        gap=gap,
        gap_sequences=0 if gap is None else min(effort.gap_sequences, len(resident)),
        quantised=FilterEvaluator(by_mass(model, run), run, resident, effort, quiet).filtered().nats if density else None,
        other_steps={str(k): measure.filtered(steps=k).nats for k in effort.steps if measure.refines and k != measure.steps},
        facts={
            **{name: facts[name] for name in ("epoch", "weights_sha256") if name in facts},
            "data": sequences.name,
            "data_sha256": sequences.sha256,
        },
    )


def by_mass(model: FilterModel, run: SequenceRunConfig) -> FilterModel:
    """The same weights under the mass of 16-bit intervals instead of the density."""
    generative = run.architecture.generative
    assert isinstance(generative, VRNNArchitecture | SRNNArchitecture)
    quantised = build_filter(FilterArchitecture(replace(generative, likelihood="quantised_gaussian"), run.architecture.inference))
    quantised.load_state_dict(model.state_dict(), strict=True)
    return quantised.eval().requires_grad_(False)


def save(evaluation: FilterEvaluation, folder: Path) -> Path:
    """Writes evaluation.json (of the validation split) or evaluation-<split>.json beside the checkpoint."""
    name = "evaluation.json" if evaluation.split == "valid" else f"evaluation-{evaluation.split}.json"
    return write_json(folder / name, asdict(evaluation))


def table(evaluations: Sequence[FilterEvaluation]) -> str:
    """Checkpoints side by side; free energies, smaller is better."""
    others = sorted({k for e in evaluations for k in e.other_steps}, key=int)
    rows: list[tuple[str, list[str]]] = [
        ("split", [e.split for e in evaluations]),
        ("epochs", [str(e.epochs) for e in evaluations]),
        ("frames, sequences", [f"{e.frames}, {e.sequences}" for e in evaluations]),
        ("frames alike", [f"{-e.elbo.frames:.3f} ± {e.spread:.3f}" for e in evaluations]),
        ("sequences alike", [f"{-e.elbo.sequences:.3f}" for e in evaluations]),
        ("first frame unscored, frames", [_free(e.elbo.later_frames) for e in evaluations]),
        ("first frame unscored, sequences", [_free(e.elbo.later_sequences) for e in evaluations]),
        ("as published (over T, T − 1 scored)", [f"{-e.elbo.published:.3f}" for e in evaluations]),
        ("KL", [f"{e.kl:.3f}" for e in evaluations]),
        ("after 0 … K steps", [" ".join(f"{-value:.3f}" for value in e.trace) for e in evaluations]),
        *((f"{k} steps at every frame, frames alike", [_other(e, k) for e in evaluations]) for k in others),
        ("FIVO bound (ELBO of the same)", [f"{-e.bound:.3f} ({-e.bound_elbo:.3f}), N = {e.particles}" for e in evaluations]),
        ("amortization gap per frame", ["—" if e.gap is None else f"{e.gap:.3f}" for e in evaluations]),
        ("by 16-bit mass, frames alike", ["—" if e.quantised is None else f"{-e.quantised.frames:.3f}" for e in evaluations]),
    ]
    width = max(len(name) for name, _ in rows)
    columns = [max(len(cells[i]) for _, cells in rows) for i in range(len(evaluations))]
    columns = [max(column, len(e.name)) for column, e in zip(columns, evaluations, strict=True)]
    head = f"{'free energy, nats per frame':{width}}  " + "  ".join(f"{e.name:>{c}}" for e, c in zip(evaluations, columns, strict=True))
    lines = [f"{name:{width}}  " + "  ".join(f"{cell:>{c}}" for cell, c in zip(cells, columns, strict=True)) for name, cells in rows]
    return "\n".join([head, *lines])


def _free(elbo: float | None) -> str:
    return "—" if elbo is None else f"{-elbo:.3f}"


def _other(evaluation: FilterEvaluation, steps: str) -> str:
    return f"{-evaluation.other_steps[steps].frames:.3f}" if steps in evaluation.other_steps else "—"
