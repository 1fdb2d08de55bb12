"""What an artifact says of a sequence model: its frames, state, the ELBO per frame against steps; real frames as its reference.

B sequences, T frames, K steps, S samples, X entries per frame, D latent size.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.artifact import Arrays, Curve, LevelSpec, LikelihoodSpec, Quantiles, XSpec
from models.catalogue import FilterModel
from models.filter_programs import FRAME, FilterPrograms, filter_programs
from models.filtering import filter_sequence, random_noise
from models.programs import level_names
from training.checkpoint import data_of
from training.data.ragged import Ragged
from training.data.sequence_batches import ResidentSequences, evaluation_batches
from training.data.sequences import Sequences
from training.export_files import PROBABILITIES, REFERENCE_ROWS, Description, ExportError, reference_run
from training.sequence_config import SequenceRunConfig

MAX_STEPS = 16
CURVE_STEPS = (0, 1, 2, 3, 4, 8, 16)
CURVE_SEED = 4
REFERENCE_FRAMES = 3
PIECE = 100
"""Frames of a sequence that the curve sees at most: many short pieces say more of the spread than a few long ones."""

UNITS = {
    "bernoulli": "nats per frame",
    "gaussian": "nats per frame; log density of standardised entries",
    "quantised_gaussian": "nats per frame; log mass of 16-bit intervals",
}


def describe_filter(
    model: FilterModel, run: SequenceRunConfig, frames: int, data_root: str | None, facts: Mapping[str, Any] | None = None
) -> Description:
    """The programs of a sequence model, its first state, their reference, and its part of the card, measured on about `frames` frames.

    Raises:
        DataError: the data are not those of `facts`. ExportError: their sequences are too short.
    """
    sequences = data_of(run, facts or {}, data_root)
    served = filter_programs(model, run.refinement.steps)
    likelihood = getattr(run.architecture.generative, "likelihood", "gaussian")
    refines = model.inference.refines
    steps = CURVE_STEPS if refines else (0,)
    valid, train = (_traces(model, part, steps, run.refinement.samples, frames) for part in (sequences.valid, sequences.train))
    quantiles = [torch.quantile(values, torch.tensor(PROBABILITIES, dtype=torch.float64)).tolist() for values in train]
    card = {
        "family": "filter",
        "description": f"{run.architecture.inference.kind} filter of a {run.architecture.generative.kind}, {run.name}, "
        f"trained on {run.data.name}",
        "x": _describe_x(model, sequences, likelihood),
        "likelihood": LikelihoodSpec(name=likelihood, parameters=tuple(served_parameters(served))),
        "levels": tuple(LevelSpec(name=f"q{i}", size=d, parameters=level_names(i)) for i, d in enumerate(model.generative.latent_sizes)),
        "carry": served.carry,
        "context": served.context,
        "state": served.state,
        "max_steps": MAX_STEPS if refines else 0,
        "curve": Curve(
            steps=steps,
            elbo=tuple(float(v.mean()) for v in valid),
            elbo_std=tuple(float(v.std(correction=min(1, len(v) - 1))) for v in valid),
            rows=len(valid[0]),
            samples=run.refinement.samples,
        ),
        "quantiles": Quantiles(probabilities=PROBABILITIES, steps=steps, elbo=tuple(tuple(row) for row in quantiles)),
    }
    found = reference(model, run.refinement.steps, *_rows(sequences))
    return Description(served.programs, served.begin_arrays(), found, card, (sequences.name, sequences.sha256))


def served_parameters(served: FilterPrograms) -> list[str]:
    """Names of the likelihood's parameters: what `sample_x` reads besides noise."""
    return [spec.name for spec in served.programs["sample_x"].inputs if not spec.name.startswith("noise")]


def _describe_x(model: FilterModel, sequences: Sequences, likelihood: str) -> XSpec:
    low, high = {"binary": (0.0, 1.0), "audio": (-1.0, 1.0)}.get(sequences.kind, (None, None))
    said = sequences.description
    if sequences.kind == "audio":
        said = f"{said}; PCM in −1…1, standardised inside by mean {sequences.mean:.3g} and std {sequences.std:.4g}".removeprefix("; ")
    return XSpec(
        shape=(model.generative.x_size,),
        minimum=low,
        maximum=high,
        units=UNITS.get(likelihood, "nats per frame"),
        description=said,
        sample_rate=sequences.sample_rate,
        mean=sequences.mean,
        std=sequences.std,
    )


def _traces(model: FilterModel, part: Ragged, steps: tuple[int, ...], samples: int, frames: int) -> list[Tensor]:
    """The ELBO of every frame when each frame gets k steps, for each k: (F,) float64 each."""
    pieces, left = [], frames
    for i in range(len(part)):
        if left > 0:
            pieces.append(part[i][: min(PIECE, left)])
            left -= len(pieces[-1])
    sequences = ResidentSequences.of(Ragged.of(pieces))
    (latent,) = model.generative.latent_sizes
    values = []
    for count in steps:
        generator = torch.Generator().manual_seed(CURVE_SEED)
        seen = []
        for batch in evaluation_batches(sequences, min(128, len(sequences))):
            mask = batch.mask[..., None].expand_as(batch.x)
            noise = random_noise(generator, len(batch.x), latent, count, samples)
            filtered = filter_sequence(model.generative, model.inference, batch.x, mask, noise)
            seen.append(filtered.elbo[batch.mask > 0])
        values.append(torch.cat(seen).double())
    return values


def _rows(sequences: Sequences) -> tuple[Tensor, Tensor]:
    """(B, T, X) real frames and a mask: at the last frame one row is half hidden and one wholly."""
    long = [piece for piece in sequences.valid if len(piece) >= REFERENCE_FRAMES]
    if not long:
        raise ExportError(f"{sequences.name}: no validation sequence has {REFERENCE_FRAMES} frames, which the reference needs")
    # several windows of one sequence where there are few
    windows = []
    for i in range(REFERENCE_ROWS):
        piece = long[i % len(long)]
        start = (len(piece) - REFERENCE_FRAMES) * (i + 1) // (REFERENCE_ROWS + 1)
        windows.append(torch.from_numpy(piece[start : start + REFERENCE_FRAMES].copy()).float())
    x = torch.stack(windows)
    mask = torch.ones_like(x)
    mask[0, -1, : x.shape[-1] // 2] = 0
    mask[1, -1] = 0
    return x, mask


def reference(model: FilterModel, trained_steps: int, x: Tensor, mask: Tensor) -> dict[str, tuple[Arrays, Arrays]]:
    """Inputs and float64 outputs of every program at the last of a few real frames (B, T, X); λ is that of a few steps on."""
    exact = filter_programs(copy.deepcopy(model).double(), trained_steps)
    generator = torch.Generator().manual_seed(7)
    rows = len(x)
    known: dict[str, Tensor] = {name: value.double().expand(rows, -1) for name, value in exact.begin.items()}
    found: dict[str, tuple[Arrays, Arrays]] = {}
    answer = [name for name in ("init", *["step"] * 3) if name in exact.programs]
    for t in range(x.shape[1]):
        known |= {"x": x[:, t].double(), "mask": mask[:, t].double()}
        before = dict(known)
        for name in ["predict", *answer, "advance", "sample_x"]:
            found[name] = reference_run(exact.programs[name], known, rows, generator)
            known |= {k: torch.from_numpy(v).double() for k, v in found[name][1].items() if k != "x"}
        found[FRAME] = reference_run(exact.programs[FRAME], before, rows, generator)
    return found
