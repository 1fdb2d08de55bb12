"""Small models trained for seconds on the real sample, with their logs: what a report is made from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models.architecture import Architecture, DirectArchitecture, InferenceArchitecture, IterativeArchitecture, VAEArchitecture
from models.catalogue import build
from models.objective import Noise
from training.checkpoint import save_weights
from training.config import DataConfig, RefinementConfig, RunConfig
from training.data.binarise import binarise
from training.data.catalogue import load
from training.report.make import Effort
from training.report.race import RaceEffort
from training.step import accumulate, fresh_noise

SAMPLE = f"npz:{Path(__file__).resolve().parents[2] / 'data' / 'mnist_sample.npz'}"
ITERATIVE = IterativeArchitecture(encodings=("x", "grad_layer_norm", "grad_log_sign", "q"), hidden=(32,))
TINY = RunConfig(
    name="tiny",
    architecture=Architecture(VAEArchitecture(latent=4, hidden=(32,)), ITERATIVE),
    data=DataConfig(SAMPLE),
    refinement=RefinementConfig(steps=3, samples=2, antithetic=True),
    epochs=3,
)
EFFORT = Effort(
    RaceEffort(rows=16, tuning_rows=8, steps=12, samples=8, rates=(0.1, 0.01), timing_rows=4, timing_rounds=3),
    strip_rows=4,
    landscape_spacing=0.5,
)


def train(run: RunConfig, folder: Path, updates_per_epoch: int = 40) -> Path:
    """A run's folder with `best/` and log.jsonl, as `elbow-train train` leaves it."""
    model = build(run.architecture, seed=0)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    images = torch.as_tensor(load(run.data.name).train)
    sizes, refinement = model.generative.latent_sizes, run.refinement

    def noise() -> Noise:
        return fresh_noise(sizes, 64, refinement.samples, refinement.antithetic, torch.device("cpu"), generator)

    folder.mkdir()
    for epoch in range(1, run.epochs + 1):
        for _ in range(updates_per_epoch):
            x = binarise(images[torch.randint(len(images), (64,), generator=generator)], generator)
            trace = accumulate(model, x, torch.ones_like(x), refinement.steps, noise)
            optimiser.step()
            optimiser.zero_grad()
        line: dict[str, Any] = {"epoch": epoch, "valid_elbo": [float(seen.elbo.mean()) for seen in trace]}
        line |= {name: [float(getattr(seen, name).mean()) for seen in trace] for name in ("grad_mu", "grad_log_sigma")}
        with (folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
    save_weights(folder / "best", model, run, {"epoch": run.epochs})
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Run folders by name: "iterative" (z = 4), "z2" (z = 2), "direct". Each trained once, when first asked for."""
    root = tmp_path_factory.mktemp("runs")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            latent = 2 if name == "z2" else 4
            inference: InferenceArchitecture = DirectArchitecture(hidden=(32,)) if name == "direct" else ITERATIVE
            architecture = Architecture(VAEArchitecture(latent=latent, hidden=(32,)), inference)
            train(replace(TINY, name=f"tiny-{name}", architecture=architecture), root / name)
        return root / name

    return folder


@pytest.fixture(scope="session")
def small_effort() -> Effort:
    """Few rows, few steps, two learning rates."""
    return EFFORT
