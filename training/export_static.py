"""What an artifact says of a static model: x, λ, the trade-off curve, quantiles; and real rows as its reference."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.artifact import Arrays, Curve, LevelSpec, LikelihoodSpec, Quantiles, XSpec
from models.catalogue import LatentModel
from models.likelihood import LIKELIHOODS
from models.programs import level_names, static_programs
from training.checkpoint import data_of
from training.config import RunConfig
from training.data.binarise import observe
from training.data.images import Images
from training.evaluate import BINARISE_SEED, CURVE_STEPS, Evaluator
from training.export_files import PROBABILITIES, REFERENCE_ROWS, Description, reference_run

MAX_STEPS = 128

PIXELS = {
    "bernoulli": ("nats per image", "0 or 1, exact for binary data; grey values in [0, 1] count as cross-entropy"),
    "gaussian": ("nats per image; log density of values in [0, 1]", "grey values in [0, 1]"),
    "quantised_gaussian": ("nats per image; log mass of intervals of 1/255", "grey values in [0, 1], multiples of 1/255"),
}
"""By likelihood: units of nats, and what a pixel is."""


def describe_static(
    model: LatentModel,
    run: RunConfig,
    rows: int,
    samples: int,
    data_root: str | None,
    quiet: bool,
    facts: Mapping[str, Any] | None = None,
) -> Description:
    """The programs of a static model, their reference, and its part of the card; measured on `rows` rows of each split.

    Raises:
        DataError: the data are not those of `facts`.
    """
    images = data_of(run, facts or {}, data_root)
    served = static_programs(model)
    likelihood = run.architecture.generative.likelihood
    refines = model.inference.refines
    card = {
        "family": "static",
        "description": f"{run.architecture.inference.kind} inference, {run.name}, trained on {run.data.name}",
        "x": _describe_x(model, run, images),
        "likelihood": LikelihoodSpec(name=likelihood, parameters=LIKELIHOODS[likelihood].HEADS),
        "levels": tuple(LevelSpec(name=f"q{i}", size=d, parameters=level_names(i)) for i, d in enumerate(model.generative.latent_sizes)),
        "carry": served.carry,
        "context": served.context,
        "max_steps": MAX_STEPS if refines else 0,
        **_measure(model, run, images, rows, samples, quiet),
    }
    # a small set of one's own may hold out fewer
    rows_known = torch.arange(REFERENCE_ROWS) % len(images.valid)
    x = observe(torch.as_tensor(images.valid)[rows_known], images.kind, likelihood, _generator(BINARISE_SEED))
    return Description(served.programs, {}, reference(model, x), card, (images.name, images.sha256))


def _describe_x(model: LatentModel, run: RunConfig, images: Images) -> XSpec:
    units, values = PIXELS[run.architecture.generative.likelihood]
    return XSpec(
        shape=(model.generative.x_size,),
        minimum=0.0,
        maximum=1.0,
        units=units,
        description=f"{images.shape[0]}×{images.shape[1]} pixels, row by row; {values}",
    )


def reference(model: LatentModel, x: Tensor) -> dict[str, tuple[Arrays, Arrays]]:
    """Inputs and float64 outputs of every program, on real rows: the first is half hidden, λ is that of a few steps on."""
    programs = static_programs(copy.deepcopy(model).double()).programs
    generator = _generator(7)
    mask = torch.ones_like(x)
    mask[0, : x.shape[1] // 2] = 0
    known: dict[str, Tensor] = {"x": x.double(), "mask": mask.double()}
    found: dict[str, tuple[Arrays, Arrays]] = {}
    # each program's outputs are inputs of later ones, so λ, z and the likelihood's parameters are real ones
    order = ["init", *["step"] * 3 * ("step" in programs), "score", "prior_sample", "posterior_sample", "decode", "sample_x"]
    for name in order:
        found[name] = reference_run(programs[name], known, REFERENCE_ROWS, generator)
        known |= {output: torch.from_numpy(value) for output, value in found[name][1].items() if output != "x"}
    return found


def _measure(model: LatentModel, run: RunConfig, images: Images, rows: int, samples: int, quiet: bool) -> dict[str, Any]:
    """The validation curve and the training quantiles."""
    measured = {}
    for split in ("valid", "train"):
        pixels = torch.as_tensor(getattr(images, split)[:rows])
        x = observe(pixels, images.kind, run.architecture.generative.likelihood, _generator(BINARISE_SEED))
        evaluator = Evaluator(model, run, x, quiet=quiet)
        steps = list(CURVE_STEPS) if evaluator.refines else [0]
        measured[split] = evaluator.curve(rows, samples, steps)
    valid, train = measured["valid"], measured["train"]
    # of a single row there is no spread, and the card has no NaN
    spread = valid.std(0, correction=min(1, len(valid) - 1))
    quantiles = torch.quantile(train.double(), torch.tensor(PROBABILITIES, dtype=torch.float64), dim=0).T
    return {
        "curve": Curve(
            steps=tuple(steps), elbo=tuple(valid.mean(0).tolist()), elbo_std=tuple(spread.tolist()), rows=len(valid), samples=samples
        ),
        "quantiles": Quantiles(probabilities=PROBABILITIES, steps=tuple(steps), elbo=tuple(tuple(row) for row in quantiles.tolist())),
    }


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
