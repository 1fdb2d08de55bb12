"""The served programs of the static family: names, shapes, and that run in turn they are the refinement loop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from models.architecture import DirectArchitecture, InferenceArchitecture, IterativeArchitecture
from models.catalogue import LatentModel
from models.gaussian import DiagonalGaussian
from models.likelihood import LIKELIHOODS
from models.objective import elbo, log_weights
from models.programs import Program, static_programs
from models.refinement import steps

Draw = Callable[..., Tensor]
MakeModel = Callable[..., LatentModel]
B, S, X, D = 3, 4, 12, 3

DIRECT = DirectArchitecture((16,))
ITERATIVE = IterativeArchitecture(("x", "grad_log_sign", "q", "step"), (16, 16), recurrent=True)


def run(program: Program, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Runs a program by name and checks every array against its spec."""
    sizes = {"rows": B, "samples": S}
    for spec in program.inputs:
        assert arrays[spec.name].shape == tuple(sizes[n] if isinstance(n, str) else n for n in spec.shape), spec.name
    with torch.no_grad():
        outputs = program.function(*(arrays[spec.name] for spec in program.inputs))
    assert len(outputs) == len(program.outputs)
    for spec, value in zip(program.outputs, outputs, strict=True):
        assert value.shape == tuple(sizes[n] if isinstance(n, str) else n for n in spec.shape), spec.name
    return {spec.name: value for spec, value in zip(program.outputs, outputs, strict=True)}


def names(program: Program) -> tuple[list[str], list[str]]:
    return [spec.name for spec in program.inputs], [spec.name for spec in program.outputs]


def test_names_of_an_iterative_model(make: MakeModel) -> None:
    served = static_programs(make(ITERATIVE))
    carry = ["q0.mu", "q0.log_sigma", "memory.step", "memory.hidden"]
    assert [spec.name for spec in served.carry] == carry
    assert [spec.name for spec in served.context] == ["context.x_embedding"]
    assert {name: names(program) for name, program in served.programs.items()} == {
        "init": (["x", "mask"], [*carry, "context.x_embedding"]),
        "step": (["x", "mask", "context.x_embedding", *carry, "noise0"], [*carry, "grad_norm"]),
        "score": (["x", "mask", "q0.mu", "q0.log_sigma", "noise0"], ["log_likelihood", "kl", "log_weight"]),
        "decode": (["z0"], ["logits", "mean"]),
        "posterior_sample": (["q0.mu", "q0.log_sigma", "noise0"], ["z0"]),
        "prior_sample": (["noise0"], ["z0"]),
        "sample_x": (["logits", "noise_x"], ["x"]),
    }


def test_a_direct_model_has_no_step_and_carries_only_lambda(make: MakeModel) -> None:
    served = static_programs(make(DIRECT))
    assert "step" not in served.programs
    assert [spec.name for spec in served.carry] == ["q0.mu", "q0.log_sigma"]
    assert served.context == ()
    assert names(served.programs["init"]) == (["x", "mask"], ["q0.mu", "q0.log_sigma"])


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("architecture", [DIRECT, ITERATIVE], ids=["direct", "iterative"])
def test_arrays_have_the_shapes_of_their_specs(
    architecture: InferenceArchitecture, likelihood: str, make: MakeModel, normal: Draw, binary: Draw
) -> None:
    programs = static_programs(make(architecture, likelihood)).programs
    known = {"x": binary(B, X), "mask": binary(B, X), "noise0": normal(B, S, D), "noise_x": normal(B, S, X)}
    for name in ("init", "step", "score", "prior_sample", "posterior_sample", "decode", "sample_x"):
        if name in programs:
            known |= {key: value for key, value in run(programs[name], known).items() if key != "x"}
    assert bool(torch.isfinite(known["log_weight"]).all())


def test_programs_in_turn_are_the_refinement_loop(make: MakeModel, normal: Draw, binary: Draw) -> None:
    model, x = make(ITERATIVE), binary(B, X)
    mask = (normal(B, X) > -0.5).to(x.dtype)
    noise = [normal(B, S, D) for _ in range(4)]
    states = list(steps(model.generative, model.inference, x, mask, 4, lambda k: (noise[k],)))
    programs = static_programs(model).programs
    known = {"x": x, "mask": mask} | run(programs["init"], {"x": x, "mask": mask})
    for k in range(5):
        assert_close(known["q0.mu"], states[k].q[0].mu)
        assert_close(known["q0.log_sigma"], states[k].q[0].log_sigma)
        if k < 4:
            known |= run(programs["step"], known | {"noise0": noise[k]})
    assert float(known["grad_norm"].min()) > 0


def test_score_is_the_objective_sample_by_sample(make: MakeModel, normal: Draw, binary: Draw) -> None:
    model, x, noise = make(ITERATIVE), binary(B, X), normal(B, S, D)
    mask = (normal(B, X) > -0.5).to(x.dtype)
    q = (DiagonalGaussian(normal(B, D), normal(B, D)),)
    known = {"x": x, "mask": mask, "q0.mu": q[0].mu, "q0.log_sigma": q[0].log_sigma, "noise0": noise}
    scored = run(static_programs(model).programs["score"], known)
    terms = elbo(model.generative, q, x, mask, (noise,))
    assert_close(scored["log_likelihood"].mean(-1), terms.log_likelihood.detach())
    assert_close(scored["kl"], terms.kl)
    assert_close(scored["log_weight"], log_weights(model.generative, q, x, mask, (noise,))[1].detach())


def test_a_row_alone_equals_the_row_in_a_batch_for_every_program(make: MakeModel, normal: Draw, binary: Draw) -> None:
    programs = static_programs(make(ITERATIVE)).programs
    known = {"x": binary(B, X), "mask": binary(B, X), "noise0": normal(B, S, D), "noise_x": normal(B, S, X)}
    for name in ("init", "step", "score", "prior_sample", "posterior_sample", "decode", "sample_x"):
        program = programs[name]
        together = run(program, known)
        for i in range(B):
            with torch.no_grad():
                alone = program.function(*(known[spec.name][i : i + 1] for spec in program.inputs))
            for spec, value in zip(program.outputs, alone, strict=True):
                assert_close(value, together[spec.name][i : i + 1], atol=1e-5, rtol=1e-5)
        known |= {key: value for key, value in together.items() if key != "x"}


def test_posterior_and_prior_samples_are_reparameterised(make: MakeModel, normal: Draw) -> None:
    programs = static_programs(make(ITERATIVE)).programs
    mu, log_sigma, noise = normal(B, D), normal(B, D), normal(B, S, D)
    z = run(programs["posterior_sample"], {"q0.mu": mu, "q0.log_sigma": log_sigma, "noise0": noise})["z0"]
    assert_close(z, mu[:, None] + log_sigma.exp()[:, None] * noise)
    prior = run(programs["prior_sample"], {"noise0": noise})["z0"]
    assert torch.equal(prior, noise)
    assert prior.data_ptr() != noise.data_ptr()
