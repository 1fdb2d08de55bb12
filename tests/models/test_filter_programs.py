"""The served functions of sequence models: run one after another they are the sequence loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from models.catalogue import FilterModel
from models.filter_programs import FRAME, FilterPrograms, filter_programs
from models.filtering import FilteredSequence, filter_sequence
from models.programs import Program
from tests.models.small_filters import GENERATIVE, INFERENCE, frames, small_filter

B, T, K, S = 3, 4, 2, 2

EVERY = pytest.mark.parametrize("generative", GENERATIVE)
EVERY_INFERENCE = pytest.mark.parametrize("inference", INFERENCE)


def call(program: Program, known: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        outputs = program.function(*(known[spec.name] for spec in program.inputs))
    for spec, value in zip(program.outputs, outputs, strict=True):
        sizes = {"rows": len(known["x"]), "samples": S}
        assert value.shape == tuple(sizes.get(str(size), size) for size in spec.shape), spec.name
    return {spec.name: value for spec, value in zip(program.outputs, outputs, strict=True)}


def expected(model: FilterModel, x: Tensor, mask: Tensor, noise: Tensor) -> FilteredSequence:
    return filter_sequence(model.generative, model.inference, x, mask, lambda t: ([(part,) for part in noise[t, :-1]], (noise[t, -1],)))


def start(served: FilterPrograms, rows: int = B) -> dict[str, Tensor]:
    return {spec.name: served.begin[spec.name].expand(rows, -1) for spec in served.state}


def setting(generative: str, inference: str, generator: torch.Generator) -> tuple[FilterModel, Tensor, Tensor, Tensor]:
    model = small_filter(generative, inference)
    x, mask = frames(model.generative, B, T, generator)
    steps = K if model.inference.refines else 0
    return model, x, mask, torch.randn(T, steps + 1, B, S, model.generative.latent_sizes[0], generator=generator, dtype=x.dtype)


@EVERY
@EVERY_INFERENCE
def test_predict_step_and_advance_in_turn_are_the_sequence_loop(generative: str, inference: str, generator: torch.Generator) -> None:
    model, x, mask, noise = setting(generative, inference, generator)
    served = filter_programs(model, K)
    programs = served.programs
    out = expected(model, x, mask, noise)
    state = start(served)
    for t in range(T):
        known = {**state, "x": x[:, t], "mask": mask[:, t], "noise0": noise[t, -1]}
        known |= call(programs["predict"], known)
        assert_close(known["prior.mu"], out.prior.mu[:, t])
        if "init" in programs:
            known |= call(programs["init"], known)
        for k in range(noise.shape[1] - 1):
            known |= call(programs["step"], known | {"noise0": noise[t, k]})
            assert_close(known["elbo"], out.trace[:, t, k])
        assert_close(known["q0.mu"], out.q.mu[:, t])
        known |= call(programs["advance"], known | {"noise0": noise[t, -1]})
        assert_close(known["log_likelihood"], out.log_likelihood[:, t])
        assert_close(known["kl"][:, 0], out.kl[:, t])
        assert_close(known["mean"].mean(1), out.reconstruction[:, t])
        state = {spec.name: known[spec.name] for spec in served.state}
    assert_close(state, {f"state.{name}": value for name, value in out.state.items()})


@EVERY
@EVERY_INFERENCE
def test_the_fused_frame_is_the_sequence_loop(generative: str, inference: str, generator: torch.Generator) -> None:
    model, x, mask, noise = setting(generative, inference, generator)
    served = filter_programs(model, K)
    out = expected(model, x, mask, noise)
    state = start(served)
    for t in range(T):
        drawn = {"noise0": noise[t, :-1].transpose(0, 1), "noise_advance": noise[t, -1]}
        results = call(served.programs[FRAME], {**state, **drawn, "x": x[:, t], "mask": mask[:, t]})
        assert_close(results["trace"], out.trace[:, t])
        assert_close(results["q0.log_sigma"], out.q.log_sigma[:, t])
        state = {spec.name: results[spec.name] for spec in served.state}
    assert_close(state, {f"state.{name}": value for name, value in out.state.items()})


@pytest.mark.parametrize("inference", ["avf with x", "own"])
@EVERY
def test_a_row_of_a_fused_frame_equals_the_row_alone(generative: str, inference: str, generator: torch.Generator) -> None:
    model, x, mask, noise = setting(generative, inference, generator)
    served = filter_programs(model, K)
    known = {**start(served), "x": x[:, 0], "mask": mask[:, 0]}
    known |= {"noise0": noise[0, :-1].transpose(0, 1), "noise_advance": noise[0, -1]}
    together = call(served.programs[FRAME], known)
    for row in range(B):
        alone = call(served.programs[FRAME], {name: value[row : row + 1] for name, value in known.items()})
        assert_close(alone, {name: value[row : row + 1] for name, value in together.items()})


@EVERY
def test_the_beginning_is_one_row_per_state_array(generative: str) -> None:
    served = filter_programs(small_filter(generative, "avf"), K)
    assert served.begin.keys() == {spec.name for spec in served.state}
    assert {tuple(value.shape) for value in served.begin.values()} == {(1, int(spec.shape[1])) for spec in served.state}
    assert all(name.startswith("begin.") for name in served.begin_arrays())


@EVERY
def test_the_predicted_frame_can_be_sampled_from_its_parameters(generative: str, generator: torch.Generator) -> None:
    model, x, mask, noise = setting(generative, "avf", generator)
    served = filter_programs(model, K)
    known = {**start(served), "x": x[:, 0], "mask": mask[:, 0], "noise0": noise[0, 0]}
    known |= call(served.programs["predict"], known)
    zero = torch.zeros(B, S, model.generative.x_size, dtype=x.dtype)
    drawn = call(served.programs["sample_x"], known | {"noise_x": zero})["x"]
    likelihood_mean = known["mean"]
    if "logits" in known:
        assert set(drawn.unique().tolist()) <= {0.0, 1.0}
    else:
        assert_close(drawn, likelihood_mean)


def test_a_refining_model_has_steps_and_an_own_filter_an_init() -> None:
    assert {"predict", "step", "advance", "sample_x", FRAME} == filter_programs(small_filter("vrnn", "avf"), 1).programs.keys()
    assert {"predict", "init", "advance", "sample_x", FRAME} == filter_programs(small_filter("vrnn", "own"), 1).programs.keys()
