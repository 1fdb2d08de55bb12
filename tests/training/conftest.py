"""A run that takes a second: 784 pixels of a few real digits, a model of a few thousand weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from models.architecture import Architecture, IterativeArchitecture, VAEArchitecture
from training.config import DataConfig, OptimiserConfig, RefinementConfig, RunConfig

SAMPLE = Path(__file__).parents[1] / "data" / "mnist_sample.npz"


@pytest.fixture(scope="session")
def tiny_run() -> RunConfig:
    return four_by_four()


def four_by_four() -> RunConfig:
    """Four epochs of four updates."""
    return RunConfig(
        name="tiny",
        architecture=Architecture(VAEArchitecture(784, 4, (16,)), IterativeArchitecture(("x", "grad_layer_norm", "q"), (16,))),
        data=DataConfig(f"npz:{SAMPLE}", mask_probability=0.5),
        refinement=RefinementConfig(steps=2, samples=2, antithetic=True),
        optimiser=OptimiserConfig(learning_rate=2e-3, clip_norm=50.0),
        batch_size=16,
        epochs=4,
        train_rows=64,
        validation_rows=16,
    )


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Comparisons bit for bit need the same number of threads on both sides; and on a busy machine two threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
