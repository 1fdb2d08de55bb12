"""A sequence model's artifact: programs in both formats, its first state beside the weights, curve and quantiles per frame."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from models.architecture import FilterArchitecture, IterativeArchitecture, SRNNArchitecture, VRNNArchitecture
from models.artifact import WEIGHTS, Artifact
from models.catalogue import build_filter
from models.filter_programs import FRAME, filter_programs
from training.checkpoint import load_filter, load_weights, save_weights
from training.config import RefinementConfig
from training.export import _with_likelihood, export
from training.export_files import ExportError, run_onnx
from training.export_filter import describe_filter
from training.sequence_config import SequenceDataConfig, SequenceRunConfig

ROLLS = f"rolls:{Path(__file__).parents[1] / 'data' / 'chorales_sample.npz'}"
NET = IterativeArchitecture(encodings=("q_layer_norm", "grad_layer_norm"), hidden=(16,), highway=False)
SRNN = FilterArchitecture(SRNNArchitecture(latent=4, hidden=8, prior_hidden=(8,), decoder_hidden=(8,)), NET)


def checkpoint(folder: Path, architecture: FilterArchitecture) -> Path:
    run = SequenceRunConfig("tiny", architecture, SequenceDataConfig(ROLLS, frames=8), RefinementConfig(steps=1))
    model = build_filter(architecture, seed=1)
    for parameter in model.inference.parameters():  # heads that start at zero would make every step the same
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))
    save_weights(folder, model, run, {"epoch": 1})
    return folder


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("filter")
    return Artifact.open(export(checkpoint(folder / "run", SRNN), folder, "tiny-filter", "1", rows=24))


def test_the_card_says_what_a_stream_needs(artifact: Artifact) -> None:
    card = artifact.card
    assert (card.family, card.trained_steps, card.max_steps, card.x.shape) == ("filter", 1, 16, (88,))
    assert (card.x.mean, card.x.std) == (None, None), "piano rolls are not standardised"
    assert {"predict", "step", "advance", FRAME, "sample_x"} == set(card.programs)
    assert {spec.name for spec in card.state} == {"state.h", "state.c", "state.z"}
    assert card.curve.steps == card.quantiles.steps
    assert all(np.all(np.diff(row) >= 0) for row in card.quantiles.elbo)
    assert card.curve.rows == 24


def test_the_first_state_lies_beside_the_weights(artifact: Artifact) -> None:
    arrays = load_file(artifact.file(WEIGHTS))
    model, run, _ = load_filter(artifact.path)
    for name, value in filter_programs(model, run.refinement.steps).begin_arrays().items():
        np.testing.assert_array_equal(arrays[name], value.numpy())


def test_a_frame_of_another_number_of_rows_agrees_with_the_model(artifact: Artifact) -> None:
    model, run, _ = load_filter(artifact.path)
    served = filter_programs(model, run.refinement.steps)
    inputs, _ = artifact.reference()[FRAME]
    three = [inputs[spec.name][[0, 2, 1]] for spec in served.programs[FRAME].inputs]
    with torch.no_grad():
        expected = served.programs[FRAME].function(*map(torch.from_numpy, three))
    for spec, value, wanted in zip(served.programs[FRAME].outputs, run_onnx(artifact.file(f"{FRAME}.onnx"), three), expected, strict=True):
        np.testing.assert_allclose(value, wanted.numpy(), rtol=1e-4, atol=1e-4, err_msg=spec.name)


def test_a_likelihood_of_other_heads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="trained with bernoulli cannot serve quantised_gaussian"):
        export(checkpoint(tmp_path / "run", SRNN), tmp_path, "tiny", "1", rows=8, likelihood="quantised_gaussian")


def test_density_weights_serve_masses(tmp_path: Path) -> None:
    architecture = FilterArchitecture(
        VRNNArchitecture(88, 4, 8, "gru", (8,), (8,), (8,), (8,), likelihood="gaussian"), IterativeArchitecture(NET.encodings, (16,))
    )
    model, run, _ = load_weights(checkpoint(tmp_path / "run", architecture))
    masses, served = _with_likelihood(model, run, "quantised_gaussian")
    described = describe_filter(masses, served, 8, None)
    assert described.card["likelihood"].name == "quantised_gaussian"
    assert max(described.card["curve"].elbo) < 0  # the log of a mass
    assert described.programs.keys() == filter_programs(masses, 2).programs.keys()
