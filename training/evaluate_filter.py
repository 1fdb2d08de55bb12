"""What a sequence model is worth, on whole validation (or test) sequences. All in nats; free energies are −ELBO.

Conventions differ between papers by more than methods do, so all of them are given:
- frames weighted alike (total nats over all scored frames), or sequences alike (mean over sequences of their own mean);
- the first frame scored, or only initialising; divided by the frames scored, or, as published by Marino 2018, by T (T − 1 scored);
- audio by density of standardised samples, and by the mass of 16-bit intervals (`quantised`), which silence cannot inflate;
- beside the one-sample ELBO a bound of N particles with resampling (FIVO, Maddison 2017), which is tighter.

B sequences, T frames, K steps, N particles, D latent size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from models.architecture import FilterArchitecture, OptimiserArchitecture, SRNNArchitecture, VRNNArchitecture
from models.catalogue import FilterModel, build_filter, infer_with
from models.filtering import filter_frame, filter_sequence, predict, random_noise
from models.gaussian import Posterior
from models.generative.filter import Frame
from models.inference.base import State
from models.objective import elbo
from models.refinement import refine_once
from training.data.sequence_batches import ResidentSequences, SequenceBatch, evaluation_batches
from training.data.sequence_catalogue import load_sequences
from training.sequence_config import SequenceRunConfig

SEED = 5
GAP_RATE, GAP_STEPS, GAP_SAMPLES = 0.02, 150, 200


@dataclass(frozen=True)
class FilterEffort:
    """How much to spend. `sequences`: the first so many of the split (None = all); `gap_frames`: of one batch of sequences."""

    seeds: int = 3
    particles: int = 16
    particle_sequences: int | None = 32
    gap_sequences: int = 16
    gap_frames: int = 8
    sequences: int | None = None
    rows_at_once: int = 128


@dataclass(frozen=True)
class Nats:
    """Mean ELBO per frame under each convention.

    Attributes:
        frames, sequences: first frame scored; frames weighted alike, sequences weighted alike.
        later_frames, later_sequences: first frame only initialising, divided by the frames scored.
        published: first frame only initialising, divided by T, sequences weighted alike (Marino 2018's code).
    """

    frames: float
    sequences: float
    later_frames: float
    later_sequences: float
    published: float

    @staticmethod
    def of(values: Tensor, mask: Tensor) -> Nats:
        """From ELBOs (B, T) and which of them are frames."""
        values, mask = (values * mask).double(), mask.double()
        lengths, totals = mask.sum(1), values.sum(1)
        later = totals - values[:, 0]
        scored = (lengths - 1).clamp(min=1)
        return Nats(
            frames=float(totals.sum() / lengths.sum()),
            sequences=float((totals / lengths).mean()),
            later_frames=float(later.sum() / scored.sum()),
            later_sequences=float((later / scored).mean()),
            published=float((later / lengths).mean()),
        )


@dataclass
class FilterEvaluation:
    """The figures of one checkpoint on one split.

    Attributes:
        elbo: at the trained K. trace: mean ELBO per frame after 0 … K steps, all frames alike. kl: per frame.
        spread: standard deviation of elbo.frames over evaluation seeds.
        bound: FIVO per frame with `particles` particles, and the one-sample ELBO of the same sequences.
        quantised: by mass, where the likelihood is a density.
        gap: mean amortization gap per frame: best of Adam from λ_K on the frame's own objective, minus λ_K's.
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
    gap: float | None = None
    quantised: Nats | None = None
    facts: dict[str, Any] = field(default_factory=dict)


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
        ValueError: the data set has no such split.
    """
    effort = effort or FilterEffort()
    sequences = load_sequences(run.data.name, data_root)
    if split not in sequences.splits:
        raise ValueError(f"split: {run.data.name} has {', '.join(sequences.splits)}, not {split!r}")
    part = sequences.splits[split]
    part = part if effort.sequences is None else part[: effort.sequences]
    resident = ResidentSequences.of(part)
    measure = _Measure(model, run, resident, effort, quiet)
    values, trace, kl, mask = measure.whole(SEED)
    means = [float((measure.whole(SEED + i)[0] * mask).sum() / mask.sum()) for i in range(1, effort.seeds)]
    means.append(float((values * mask).sum() / mask.sum()))
    bound, bound_elbo = measure.particles()
    density = getattr(run.architecture.generative, "likelihood", None) == "gaussian"
    return FilterEvaluation(
        name=run.name,
        split=split,
        epochs=int(facts.get("epoch") or 0),
        frames=int(mask.sum()),
        sequences=len(mask),
        steps=measure.steps,
        elbo=Nats.of(values, mask),
        trace=trace,
        kl=kl,
        spread=float(torch.tensor(means).std(correction=0)),
        bound=bound,
        bound_elbo=bound_elbo,
        particles=effort.particles,
        gap=measure.gap() if model.inference.refines and effort.gap_frames else None,
        quantised=_Measure(by_mass(model, run), run, resident, effort, quiet).nats() if density else None,
        facts={"data_sha256": sequences.sha256, "data": sequences.name},
    )


def by_mass(model: FilterModel, run: SequenceRunConfig) -> FilterModel:
    """The same weights under the mass of 16-bit intervals instead of the density."""
    generative = run.architecture.generative
    assert isinstance(generative, VRNNArchitecture | SRNNArchitecture)
    quantised = build_filter(FilterArchitecture(replace(generative, likelihood="quantised_gaussian"), run.architecture.inference))
    quantised.load_state_dict(model.state_dict(), strict=True)
    return quantised.eval().requires_grad_(False)


class _Measure:
    """The figures of one model on one set of sequences."""

    def __init__(self, model: FilterModel, run: SequenceRunConfig, sequences: ResidentSequences, effort: FilterEffort, quiet: bool):
        self.model, self.sequences, self.effort, self.quiet = model, sequences, effort, quiet
        self.steps = run.refinement.steps if model.inference.refines else 0
        self.samples = run.refinement.samples
        (self.latent,) = model.generative.latent_sizes

    def batches(self) -> Iterator[tuple[SequenceBatch, Tensor]]:
        """Batches, and the mask of their entries, (B, T, X)."""
        batches = evaluation_batches(self.sequences, min(self.effort.rows_at_once, len(self.sequences)))
        for batch in tqdm(batches, desc="sequences", unit="batch", disable=self.quiet, leave=False):
            yield batch, batch.mask[..., None].expand_as(batch.x)

    def whole(self, seed: int) -> tuple[Tensor, list[float], float, Tensor]:
        """ELBO of every frame (B, T) at the trained K, mean trace, mean KL, and which entries are frames; all sequences."""
        generator = torch.Generator().manual_seed(seed)
        longest = int(self.sequences.cpu_lengths.max())
        values, masks, trace, kl = [], [], torch.zeros(self.steps + 1, dtype=torch.float64), 0.0
        for batch, mask in self.batches():
            noise = random_noise(generator, len(batch.x), self.latent, self.steps, self.samples)
            filtered = filter_sequence(self.model.generative, self.model.inference, batch.x, mask, noise)
            padding = (0, longest - batch.mask.shape[1])
            values.append(torch.nn.functional.pad(filtered.elbo * batch.mask, padding))
            masks.append(torch.nn.functional.pad(batch.mask, padding))
            trace += (filtered.trace * batch.mask[..., None]).sum((0, 1)).double()
            kl += float((filtered.kl * batch.mask).sum())
        mask = torch.cat(masks)
        return torch.cat(values), (trace / mask.sum()).tolist(), kl / float(mask.sum()), mask

    def nats(self) -> Nats:
        values, _, _, mask = self.whole(SEED)
        return Nats.of(values, mask)

    def particles(self) -> tuple[float, float]:
        """FIVO per frame: log of the mean weight of N particles, resampled when fewer than half are effective; and the ELBO."""
        count = self.effort.particle_sequences or len(self.sequences)
        x, mask = self._first(count, None)
        many, (rows, frames) = self.effort.particles, mask.shape
        generator = torch.Generator().manual_seed(SEED)
        generative, inference = self.model.generative, self.model.inference
        state = generative.start(rows * many)
        log_w = torch.zeros(rows, many)
        total, single = torch.zeros(rows, dtype=torch.float64), 0.0
        with torch.no_grad():
            for t in range(frames):
                noise = torch.randn(self.steps + 1, rows * many, 1, self.latent, generator=generator)
                x_t = x[:, t].repeat_interleave(many, 0)
                seen = torch.ones_like(x_t)
                frame = filter_frame(generative, inference, state, x_t, seen, [(part,) for part in noise[:-1]], (noise[-1],))
                z = frame.advance.z.unsqueeze(1)
                log_x = generative.emission(frame.frame.prediction.context, z).log_prob(x_t, seen).squeeze(1)
                weight = log_x + (frame.frame.prediction.prior.log_prob(z) - frame.q[0].log_prob(z)).squeeze(1)
                log_w = log_w + weight.reshape(rows, many) * mask[:, t, None]
                single += float((frame.advance.terms.elbo.reshape(rows, many).mean(1) * mask[:, t]).sum())
                total, log_w, state = self._resampled(total, log_w, frame.advance.state, mask[:, t] > 0, generator)
            total += torch.logsumexp(log_w.double(), 1) - math.log(many)
        return float(total.sum() / mask.sum()), single / float(mask.sum())

    def _resampled(
        self, total: Tensor, log_w: Tensor, state: dict[str, Tensor], alive: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        rows, many = log_w.shape
        share = torch.softmax(log_w, 1)
        poor = alive & (1 / share.square().sum(1) < many / 2)
        if not bool(poor.any()):
            return total, log_w, state
        mean = torch.logsumexp(log_w, 1) - math.log(many)
        drawn = torch.multinomial(share, many, replacement=True, generator=generator)
        chosen = torch.where(poor[:, None], drawn, torch.arange(many).expand(rows, -1))
        index = (chosen + torch.arange(rows)[:, None] * many).flatten()
        total = total + torch.where(poor, mean, 0.0).double()
        return total, torch.where(poor[:, None], 0.0, log_w), {name: value[index] for name, value in state.items()}

    def gap(self) -> float:
        """Nats per frame that Adam, from λ_K and with fresh noise, still gains on a frame's own objective."""
        x, mask = self._first(self.effort.gap_sequences, self.effort.gap_frames)
        generator = torch.Generator().manual_seed(SEED)
        generative, rows = self.model.generative, len(x)
        adam = infer_with(generative, OptimiserArchitecture("adam", learning_rate=GAP_RATE))
        state, gained = generative.start(rows), 0.0
        with torch.no_grad():
            for t in range(x.shape[1]):
                x_t, seen = x[:, t], torch.ones_like(x[:, t])
                frame = predict(generative, state)
                noise = torch.randn(self.steps + 1, rows, self.samples, self.latent, generator=generator)
                parts = [(part,) for part in noise[:-1]]
                ended = filter_frame(generative, self.model.inference, state, x_t, seen, parts, (noise[-1],))
                belief = State(ended.q, adam.init({}, ended.q).memory)
                for _ in range(GAP_STEPS):
                    fresh = torch.randn(rows, 2, self.latent, generator=generator)
                    belief, _ = refine_once(frame, adam, x_t, seen, {}, belief, (fresh,))
                better = torch.maximum(self._value(frame, belief.q, x_t, generator), self._value(frame, ended.q, x_t, generator))
                gained += float(((better - self._value(frame, ended.q, x_t, generator)) * mask[:, t]).sum())
                state = ended.advance.state
        return gained / float(mask.sum())

    def _value(self, frame: Frame, q: Posterior, x: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(len(x), GAP_SAMPLES, self.latent, generator=generator)
        return elbo(frame, q, x, torch.ones_like(x), (noise,)).elbo

    def _first(self, sequences: int, frames: int | None) -> tuple[Tensor, Tensor]:
        """The first frames of the first sequences, (B, T, X) and which are frames (B, T)."""
        count = min(sequences, len(self.sequences))
        longest = int(self.sequences.cpu_lengths[:count].max())
        index = torch.arange(count)
        x, mask, _ = self.sequences.gather(index, torch.zeros_like(index), min(longest, frames or longest))
        return x, mask


def save(evaluation: FilterEvaluation, folder: Path) -> Path:
    """Writes evaluation.json (of the validation split) or evaluation-<split>.json beside the checkpoint."""
    name = "evaluation.json" if evaluation.split == "valid" else f"evaluation-{evaluation.split}.json"
    (folder / name).write_text(json.dumps(asdict(evaluation), indent=1) + "\n")
    return folder / name


def table(evaluations: Sequence[FilterEvaluation]) -> str:
    """Checkpoints side by side; free energies, smaller is better."""
    rows: list[tuple[str, list[str]]] = [
        ("split", [e.split for e in evaluations]),
        ("epochs", [str(e.epochs) for e in evaluations]),
        ("frames, sequences", [f"{e.frames}, {e.sequences}" for e in evaluations]),
        ("frames alike", [f"{-e.elbo.frames:.3f} ± {e.spread:.3f}" for e in evaluations]),
        ("sequences alike", [f"{-e.elbo.sequences:.3f}" for e in evaluations]),
        ("first frame unscored, frames", [f"{-e.elbo.later_frames:.3f}" for e in evaluations]),
        ("first frame unscored, sequences", [f"{-e.elbo.later_sequences:.3f}" for e in evaluations]),
        ("as published (over T, T − 1 scored)", [f"{-e.elbo.published:.3f}" for e in evaluations]),
        ("KL", [f"{e.kl:.3f}" for e in evaluations]),
        ("after 0 … K steps", [" ".join(f"{-value:.2f}" for value in e.trace) for e in evaluations]),
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
