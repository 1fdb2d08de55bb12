"""Runs of sequence models: chunks of frames, the chain of z run forward, φ and θ learned from all frames at once.

B sequences, T frames, K steps, X entries per frame, D latent size.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from models.catalogue import FilterModel, build_filter
from models.filtering import filter_sequence, random_noise
from models.generative.filter import FilterState
from training.data.ragged import Ragged
from training.data.sequence_batches import ResidentSequences, SequenceBatch, SequenceBatches, evaluation_batches
from training.data.sequences import Sequences
from training.run_loop import RunLoop
from training.sequence_config import SequenceRunConfig
from training.sequence_step import Chunk, ChunkSeen
from training.sequence_update import SequenceGradients
from training.step import fresh_noise

VALIDATION_SEED = 20181112


class SequenceTrainer(RunLoop):
    """One run of a sequence model. ELBOs in its log are nats per frame. `sequences`: the run's data, where they are read already."""

    def __init__(
        self, run: SequenceRunConfig, folder: Path, fabric: Fabric, data_root: str | None = None, sequences: Sequences | None = None
    ):
        self.run = run
        self.sequences = run.data.load(data_root) if sequences is None else sequences
        self.filters: FilterModel = build_filter(run.architecture, seed=run.seed)
        take_statistics(self.filters, self.sequences)
        super().__init__(run, folder, fabric, self.filters, self.sequences.sha256)
        train = ResidentSequences.of(self.sequences.train, self.device)
        self.batches = SequenceBatches(train, min(run.batch_size, len(train)), self.generators["order"], run.data.plan())
        self.valid = ResidentSequences.of(head_of(self.sequences.valid, run.validation_sequences, run.validate_frames), self.device)
        precision = torch.bfloat16 if run.precision == "bf16-mixed" else None
        self.gradients = SequenceGradients(self.filters, precision, run.compiled, run.later_frames)
        self.validate_every = run.validate_every
        self.state: FilterState | None = None
        """Where the rows of a carried epoch stand."""

    @property
    def progress(self) -> float:
        return min(1.0, self.spent_s / self.run.seconds) * self.run.epochs if self.run.seconds else self.batches.epoch

    @property
    def over(self) -> bool:
        return self.batches.epoch >= self.run.epochs or (self.run.seconds is not None and self.spent_s >= self.run.seconds)

    @property
    def steps(self) -> int:
        return self.run.refinement.steps if self.filters.inference.refines else 0

    def update(self, batch: SequenceBatch) -> dict[str, Tensor]:
        """Draws noise, adds up the gradients over the batch's frames, steps both optimisers; what it saw, nats per frame."""
        compiled = self.gradients.compilations
        chunk = self._chunk(batch)
        seen = self.gradients(chunk, self.run.kl_weight(self.batches.epoch))
        if self.run.data.order == "carried":
            self.state = seen.state
        frames = float(chunk.weights.sum())
        self.step_optimisers(frames)
        self.uncounted = self.gradients.compilations > compiled
        return self._means(seen, chunk.weights, frames)

    def part(self, batch: SequenceBatch) -> SequenceBatch:
        return SequenceBatch(*(field[self.fabric.global_rank :: self.fabric.world_size] for field in batch))

    def rows(self, batch: SequenceBatch) -> int:
        return len(batch.x)

    def _chunk(self, batch: SequenceBatch) -> Chunk:
        refinement, (latent,) = self.run.refinement, self.filters.generative.latent_sizes
        rows, frames = batch.mask.shape
        steps = min(self.steps, self.run.steps_at(self.progress / self.run.epochs))
        noise = torch.stack([torch.stack([self._noise(latent, rows, refinement.samples) for _ in range(steps + 1)]) for _ in range(frames)])
        x = self._transposed(batch.x)
        mask = batch.mask[..., None].expand_as(x).contiguous()
        return Chunk(x, mask, batch.mask, noise, self.state, None if self.state is None else batch.restart)

    def _noise(self, latent: int, rows: int, samples: int) -> Tensor:
        (noise,) = fresh_noise((latent,), rows, samples, self.run.refinement.antithetic, self.device, self.generators["noise"])
        return noise

    def _transposed(self, x: Tensor) -> Tensor:
        """The notes of about half of the rows shifted, each row by its own number of semitones; notes off the keyboard are lost."""
        most = self.run.data.transpose
        if not most:
            return x
        shift = torch.randint(-most, most + 1, (len(x), 1, 1), generator=self.generators["mask"], device=x.device)
        shift = shift * torch.randint(0, 2, (len(x), 1, 1), generator=self.generators["mask"], device=x.device)
        source = torch.arange(x.shape[-1], device=x.device) - shift
        inside = (source >= 0) & (source < x.shape[-1])
        return x.gather(-1, source.clamp(0, x.shape[-1] - 1).expand(x.shape)) * inside

    def _means(self, seen: ChunkSeen, weights: Tensor, frames: float) -> dict[str, Tensor]:
        frames = max(frames, 1.0)  # none, if the rows of this process are all through with a carried epoch
        elbo = (seen.elbo * weights[..., None]).sum((0, 1)) / frames
        # steps that were not made yet change nothing
        elbo = torch.cat([elbo, elbo[-1:].expand(self.steps + 1 - len(elbo))])
        kl = (seen.kl * weights).sum() / frames
        return {"elbo": elbo, "kl": kl[None]}

    def validate(self) -> list[float]:
        """Mean ELBO of a validation frame after 0 … K steps, all frames alike, the first included; the same noise every time."""
        return validation_trace(self.filters, self.valid, self.steps, self.run.refinement.samples)

    def extra_state(self) -> dict[str, Any]:
        return {"carried": self.state}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        self.state = state["carried"]


def take_statistics(model: FilterModel, sequences: Sequences) -> None:
    """Gives the model the training frames' mean and standard deviation: one number each, or the share of ones per note."""
    like = model.generative.x_mean
    if sequences.kind == "binary":
        mean = torch.from_numpy(sequences.frame_mean()).to(like)
        # notes are read around their mean, not scaled: a note that is never played has no spread
        model.generative.set_statistics(mean, torch.ones_like(mean))
    else:
        assert sequences.mean is not None
        assert sequences.std is not None
        model.generative.set_statistics(like.new_tensor(sequences.mean), like.new_tensor(sequences.std))


def head_of(part: Ragged, sequences: int | None, frames: int | None) -> Ragged:
    """The first `sequences` sequences, of each the first `frames` frames."""
    count = len(part.lengths) if sequences is None else sequences
    return Ragged.of([part[i][:frames] for i in range(min(count, len(part.lengths)))])


def validation_trace(model: FilterModel, sequences: ResidentSequences, steps: int, samples: int, rows_at_once: int = 128) -> list[float]:
    """Mean ELBO per frame after 0 … K steps, nats, over whole sequences; fixed noise."""
    device = sequences.joined.device
    generator = torch.Generator(device).manual_seed(VALIDATION_SEED)
    (latent,) = model.generative.latent_sizes
    total, frames = torch.zeros(steps + 1, dtype=torch.float64), 0.0
    for batch in evaluation_batches(sequences, min(rows_at_once, len(sequences))):
        mask = batch.mask[..., None].expand_as(batch.x)
        noise = random_noise(generator, len(batch.x), latent, steps, samples, device)
        filtered = filter_sequence(model.generative, model.inference, batch.x, mask, noise)
        total += (filtered.trace * batch.mask[..., None]).sum((0, 1)).double().cpu()
        frames += float(batch.mask.sum())
    return (total / frames).tolist()
