"""The loop: what a step keeps, how rows stop, what is reported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from models.architecture import DirectArchitecture, IterativeArchitecture, OptimiserArchitecture
from models.catalogue import LatentModel, infer_with
from models.objective import Noise, elbo, evidence
from models.refinement import TOLERANCE_WINDOW, Status, begin, refine, refine_once, steps

Draw = Callable[..., Tensor]
MakeModel = Callable[..., LatentModel]
B, S, X, D = 5, 4, 12, 3

ITERATIVE = IterativeArchitecture(("x", "grad_layer_norm", "q", "step", "previous_grad"), (16, 16), recurrent=True)


def fixed_draws(normal: Draw, count: int, rows: int = B, size: int = D) -> Callable[[int], Noise]:
    noise = [(normal(rows, S, size),) for _ in range(count)]
    return lambda k: noise[k]


def test_one_step_is_the_inference_models_step_from_the_evidence(normal: Draw, binary: Draw, make: MakeModel) -> None:
    model, x, noise = make(ITERATIVE), binary(B, X), (normal(B, S, D),)
    mask = (normal(B, X) > -0.5).to(x.dtype)
    state, context = begin(model.generative, model.inference, x, mask)
    seen = evidence(model.generative, state.q, x, mask, noise)
    expected = model.inference.step(state, context, seen)
    new, norm = refine_once(model.generative, model.inference, x, mask, context, state, noise)
    assert torch.equal(new.q[0].mu, expected.q[0].mu)
    assert torch.equal(new.memory["hidden"], expected.memory["hidden"])
    assert_close(norm, torch.cat([seen.grad[0].mu, seen.grad[0].log_sigma], -1).norm(dim=-1))


def test_a_row_of_which_nothing_is_observed_keeps_its_state(normal: Draw, binary: Draw, make: MakeModel) -> None:
    model, x, noise = make(ITERATIVE), binary(B, X), fixed_draws(normal, 3)
    mask = torch.ones_like(x)
    mask[2] = 0
    state, context = begin(model.generative, model.inference, x, mask)
    start = state
    for k in range(3):
        state, norm = refine_once(model.generative, model.inference, x, mask, context, state, noise(k))
        assert bool(torch.isfinite(norm).all())
    for name, value in state.memory.items():
        assert torch.equal(value[2], start.memory[name][2])
        assert not torch.equal(value[1], start.memory[name][1])
    assert torch.equal(state.q[0].mu[2], start.q[0].mu[2])
    assert torch.equal(state.q[0].log_sigma[2], start.q[0].log_sigma[2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_turns_non_finite_keeps_its_state_and_harms_no_other(bad: float, normal: Draw, binary: Draw, make: MakeModel) -> None:
    model, x, noise = make(ITERATIVE), binary(B, X), (normal(B, S, D),)
    mask = torch.ones_like(x)
    poisoned = x.clone()
    poisoned[1, 0] = bad
    state, context = begin(model.generative, model.inference, x, mask)
    expected, _ = refine_once(model.generative, model.inference, x, mask, context, state, noise)
    new, norm = refine_once(model.generative, model.inference, poisoned, mask, context, state, noise)
    assert torch.isfinite(norm).tolist() == [True, False, True, True, True]
    assert torch.equal(new.q[0].mu[1], state.q[0].mu[1])
    assert torch.equal(new.memory["hidden"][1], state.memory["hidden"][1])
    others = [0, 2, 3, 4]
    assert_close(new.q[0].mu[others], expected.q[0].mu[others])


def test_steps_gives_every_state_from_the_prior_on(normal: Draw, binary: Draw, make: MakeModel) -> None:
    model, x, noise = make(ITERATIVE), binary(B, X), fixed_draws(normal, 3)
    mask = torch.ones_like(x)
    states = list(steps(model.generative, model.inference, x, mask, 3, noise))
    assert len(states) == 4
    assert float(states[0].q[0].mu.abs().max()) == 0
    state, context = begin(model.generative, model.inference, x, mask)
    for k in range(3):
        state, _ = refine_once(model.generative, model.inference, x, mask, context, state, noise(k))
        assert_close(states[k + 1].q[0].mu, state.q[0].mu.detach())
    assert not states[-1].q[0].mu.requires_grad


def test_refine_reports_what_steps_reaches_and_the_elbo_of_each(normal: Draw, binary: Draw, make: MakeModel) -> None:
    model, x, noise, measure = make(ITERATIVE), binary(B, X), fixed_draws(normal, 6), (normal(B, 8, D),)
    mask = torch.ones_like(x)
    states = list(steps(model.generative, model.inference, x, mask, 6, noise))
    expected = torch.stack([elbo(model.generative, state.q, x, mask, measure).elbo.detach() for state in states], -1)
    refined = refine(model.generative, model.inference, x, mask, 6, noise, measure)
    assert_close(refined.trace, expected)
    assert_close(refined.state.q[0].mu, states[-1].q[0].mu)
    assert refined.steps_used.tolist() == [6] * B
    assert refined.status.tolist() == [Status.STEPS] * B
    best = elbo(model.generative, refined.best, x, mask, measure).elbo.detach()
    assert_close(best, expected.max(-1).values)


def test_a_direct_model_has_converged_with_no_step_used(normal: Draw, binary: Draw, make: MakeModel) -> None:
    model, x = make(DirectArchitecture((16,))), binary(B, X)
    refined = refine(model.generative, model.inference, x, torch.ones_like(x), 5, fixed_draws(normal, 5), (normal(B, 8, D),))
    assert refined.status.tolist() == [Status.CONVERGED] * B
    assert refined.steps_used.tolist() == [0] * B
    assert refined.trace.shape == (B, 1)
    assert len(list(steps(model.generative, model.inference, x, torch.ones_like(x), 5, fixed_draws(normal, 5)))) == 1


def test_a_row_converges_when_its_best_rises_by_less_than_the_tolerance_over_the_window(normal: Draw, linear_gaussian: Any) -> None:
    """Gradient ascent on a linear-Gaussian model, from a start at the optimum in one row and far from it in another."""
    x = torch.cat([linear_gaussian.b[None], linear_gaussian.b[None] + 30])
    inference = infer_with(linear_gaussian.generative, OptimiserArchitecture("sgd", learning_rate=0.02))
    noise, mask = fixed_draws(normal, 200, rows=2, size=2), torch.ones_like(x)
    measure = (normal(2, 64, 2),)
    refined = refine(linear_gaussian.generative, inference, x, mask, 200, noise, measure, tolerance=0.05)
    assert refined.status.tolist() == [Status.CONVERGED] * 2
    for row, used in enumerate(refined.steps_used.tolist()):
        best = refined.trace[row].cummax(0).values
        assert float(best[used] - best[used - TOLERANCE_WINDOW]) < 0.05
        for k in range(TOLERANCE_WINDOW, used):
            assert float(best[k] - best[k - TOLERANCE_WINDOW]) >= 0.05
        # a row that stopped repeats its last value while the other goes on
        assert torch.equal(refined.trace[row, used:], refined.trace[row, used].expand(refined.trace.shape[1] - used))
    assert refined.steps_used[0] < refined.steps_used[1]


def test_no_row_converges_before_the_window_is_full(normal: Draw, binary: Draw, make: MakeModel) -> None:
    model, x = make(ITERATIVE), binary(B, X)
    noise, measure = fixed_draws(normal, 10), (normal(B, 8, D),)
    refined = refine(model.generative, model.inference, x, torch.ones_like(x), 10, noise, measure, tolerance=1e9)
    assert refined.steps_used.tolist() == [TOLERANCE_WINDOW] * B
    assert refined.trace.shape == (B, TOLERANCE_WINDOW + 1)


def test_a_non_finite_row_stops_at_its_last_finite_posterior(normal: Draw, binary: Draw, make: MakeModel) -> None:
    model, x, good = make(ITERATIVE), binary(B, X), fixed_draws(normal, 5)

    def noise(k: int) -> Noise:
        (draw,) = good(k)
        draw = draw.clone()
        if k == 2:
            draw[3] = float("nan")
        return (draw,)

    mask, measure = torch.ones_like(x), (normal(B, 8, D),)
    refined = refine(model.generative, model.inference, x, mask, 5, noise, measure)
    assert refined.status.tolist() == [Status.STEPS] * 3 + [Status.NONFINITE, Status.STEPS]
    assert refined.steps_used.tolist() == [5, 5, 5, 2, 5]
    after_two = list(steps(model.generative, model.inference, x, mask, 2, good))[-1]
    assert_close(refined.state.q[0].mu[3], after_two.q[0].mu[3])
    assert bool(torch.isfinite(refined.trace).all())
