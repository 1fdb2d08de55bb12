"""Figures of sequence models: conventions by hand, and bounds against what is known exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from models.architecture import FilterArchitecture, VRNNArchitecture
from models.catalogue import build_filter
from tests.training.test_sequence_loop import AVF, RUN
from training.evaluate_filter import FilterEffort, Nats, evaluate_filter, save, table
from training.sequence_config import SequenceRunConfig

EFFORT = FilterEffort(seeds=2, particles=8, particle_sequences=3, gap_sequences=2, gap_frames=2, sequences=3)


def test_the_conventions_by_hand() -> None:
    values = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -6.0, 99.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    nats = Nats.of(values, mask)
    assert nats.frames == pytest.approx(-16 / 5)
    assert nats.sequences == pytest.approx((-2 - 5) / 2)
    assert nats.later_frames == pytest.approx(-11 / 3)
    assert nats.later_sequences == pytest.approx((-2.5 - 6) / 2)
    assert nats.published == pytest.approx((-5 / 3 - 3) / 2)


@pytest.fixture(scope="module")
def run() -> SequenceRunConfig:
    return RUN


def test_every_figure_is_there_and_they_agree_with_each_other(run: SequenceRunConfig, tmp_path: Path) -> None:
    model = build_filter(AVF, seed=0)
    found = evaluate_filter(model, run, {"epoch": 3}, EFFORT, quiet=True)
    assert found.elbo.frames == pytest.approx(found.trace[-1], abs=1e-4)
    assert len(found.trace) == 3
    assert found.bound > found.bound_elbo
    assert found.gap is not None
    assert found.gap >= 0
    assert found.quantised is None
    assert json.loads(save(found, tmp_path).read_text())["epochs"] == 3
    assert f"{-found.elbo.frames:.3f}" in table([found, found])


def test_a_bound_of_one_particle_is_the_elbo_on_average(run: SequenceRunConfig) -> None:
    """Without a closed form a particle's log weight has the ELBO as its mean: with N = 1 FIVO is a one-sample estimate of it."""
    model = build_filter(AVF, seed=0)
    found = evaluate_filter(model, run, {}, FilterEffort(seeds=1, particles=1, particle_sequences=3, gap_frames=0), quiet=True)
    assert found.bound == pytest.approx(found.bound_elbo, abs=0.5)


def test_masses_are_below_one_and_densities_need_not_be(run: SequenceRunConfig) -> None:
    architecture = FilterArchitecture(VRNNArchitecture(88, 4, 8, "gru", (8,), (8,), (8,), (8,)), AVF.inference)
    model = build_filter(architecture, seed=0)
    gaussian = SequenceRunConfig("tiny", architecture, run.data, run.refinement)
    found = evaluate_filter(model, gaussian, {}, EFFORT, quiet=True)
    assert found.quantised is not None
    assert found.quantised.frames < 0


def test_an_unknown_split_is_named(run: SequenceRunConfig) -> None:
    with pytest.raises(ValueError, match="train, valid"):
        evaluate_filter(build_filter(AVF, seed=0), run, {}, EFFORT, split="nothing", quiet=True)
