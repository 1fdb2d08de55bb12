"""One update against the slow and obvious way to write it: a loop with plain autograd and a detach between steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from models.architecture import Architecture, DirectArchitecture, InferenceArchitecture, IterativeArchitecture, VAEArchitecture
from models.catalogue import LatentModel, build
from models.gaussian import DiagonalGaussian
from models.inference.base import State
from models.objective import Evidence, Noise, elbo, prediction_errors
from models.refinement import begin
from training.step import accumulate, fresh_noise

B, S, X, D, K = 6, 2, 10, 3, 4

ITERATIVE = {
    "gradients": IterativeArchitecture(("x", "grad_layer_norm", "grad_log_sign", "q"), (16, 16)),
    "errors": IterativeArchitecture(("x", "error_x", "error_z", "q"), (16, 16), encode_mask=True),
    "recurrent": IterativeArchitecture(("grad_raw", "q", "step", "previous_grad"), (16,), recurrent=True, highway=True),
}


def model_of(inference: InferenceArchitecture, dtype: torch.dtype) -> LatentModel:
    model = build(Architecture(VAEArchitecture(X, D, (16,)), inference), seed=0).to(dtype)
    heads = getattr(model.inference, "heads", None)
    if heads is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            torch.nn.init.normal_(heads.weight, std=0.3)
    return model


@pytest.fixture
def batch(dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor, list[Noise]]:
    x = (torch.rand(B, X, generator=generator) < 0.5).to(dtype)
    mask = (torch.rand(B, X, generator=generator) < 0.7).to(dtype)
    noise = [(torch.randn(B, S, D, generator=generator, dtype=torch.float64).to(dtype),) for _ in range(K + 1)]
    return x, mask, noise


def naive(
    model: LatentModel, x: Tensor, mask: Tensor, noise: list[Noise], kl_weight: float, linked: int | None = None
) -> dict[str, Tensor]:
    """The loss of Marino 2018 written as it reads: φ from the mean over steps, θ from the last step only. From step `linked` on without
    the detach of λ."""
    theta, phi = list(model.generative.parameters()), list(model.inference.parameters())
    state, context = begin(model.generative, model.inference, x, mask)
    losses = []
    for k in range(K):
        mu, log_sigma = (part.detach().requires_grad_() for part in (state.q[0].mu, state.q[0].log_sigma))
        q = (DiagonalGaussian(mu, log_sigma),)
        terms = elbo(model.generative, q, x, mask, noise[k])
        grad = torch.autograd.grad(terms.annealed(kl_weight).sum(), (mu, log_sigma))
        detached = (q[0].detach(),)
        error_x, error_z = prediction_errors(model.generative, detached, x, mask, noise[k])
        error_z = tuple(error.detach() for error in error_z)
        seen = Evidence((DiagonalGaussian(*grad),), error_x.detach(), error_z, terms)
        if linked is None or k <= linked:
            state = State(detached, {name: value.detach() for name, value in state.memory.items()})
        state = model.inference.step(state, context, seen)
        losses.append(-elbo(model.generative, state.q, x, mask, noise[k + 1]).annealed(kl_weight).sum())
    mean = torch.stack(losses).sum() / K
    last = -elbo(model.generative, (state.q[0].detach(),), x, mask, noise[K]).annealed(kl_weight).sum()
    gradients = (*torch.autograd.grad(last, theta), *torch.autograd.grad(mean, phi))
    return {name: gradient for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True)}


@pytest.mark.parametrize(("kl_weight", "linked"), [(1.0, None), (0.3, None), (0.3, 0), (1.0, 2)])
@pytest.mark.parametrize("architecture", ITERATIVE.values(), ids=ITERATIVE)
def test_gradients_of_an_iterative_update_are_those_of_the_naive_loop(
    architecture: IterativeArchitecture,
    kl_weight: float,
    linked: int | None,
    batch: tuple[Tensor, Tensor, list[Noise]],
    dtype: torch.dtype,
) -> None:
    model, (x, mask, noise) = model_of(architecture, dtype), batch
    expected = naive(model, x, mask, noise, kl_weight, linked)
    draws = iter(noise)
    trace = accumulate(model, x, mask, K, lambda: next(draws), kl_weight, linked=linked)
    assert len(trace) == K + 1
    assert next(draws, None) is None
    tolerance = {"atol": 1e-9, "rtol": 1e-9} if dtype == torch.float64 else {"atol": 1e-3, "rtol": 1e-3}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert_close(parameter.grad, expected[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)
        assert bool((parameter.grad != 0).any()), name


def test_linked_steps_learn_what_they_leave_to_the_next(batch: tuple[Tensor, Tensor, list[Noise]], dtype: torch.dtype) -> None:
    gradients = []
    for linked in (None, K, 2, 0):
        model, (x, mask, noise) = model_of(ITERATIVE["gradients"], dtype), batch
        draws = iter(noise)
        accumulate(model, x, mask, K, lambda draws=draws: next(draws), late=True, linked=linked)  # type: ignore[misc]
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]))
    assert_close(gradients[1], gradients[0], atol=1e-4 if dtype == torch.float32 else 1e-10, rtol=1e-4)
    apart = [float((gradient - gradients[0]).norm() / gradients[0].norm()) for gradient in gradients[2:]]
    assert 1e-3 < apart[0] < apart[1]


def test_gradients_of_a_direct_update_are_those_of_plain_autograd(batch: tuple[Tensor, Tensor, list[Noise]], dtype: torch.dtype) -> None:
    model, (x, mask, noise) = model_of(DirectArchitecture((16,)), dtype), batch
    state, _ = begin(model.generative, model.inference, x, mask)
    terms = elbo(model.generative, state.q, x, mask, noise[0])
    expected = torch.autograd.grad(-terms.annealed(0.3).sum(), list(model.parameters()))
    (seen,) = accumulate(model, x, mask, K, lambda: noise[0], 0.3)
    assert_close([parameter.grad for parameter in model.parameters()], list(expected))
    assert_close(seen.elbo, terms.elbo.detach())
    assert_close(seen.log_likelihood, terms.log_likelihood.detach())


def test_the_trace_is_the_elbo_after_each_step_and_the_size_of_its_gradient(
    batch: tuple[Tensor, Tensor, list[Noise]], dtype: torch.dtype
) -> None:
    model, (x, mask, noise) = model_of(ITERATIVE["gradients"], dtype), batch
    draws = iter(noise)
    trace = accumulate(model, x, mask, K, lambda: next(draws), 1.0)
    mu, log_sigma = (torch.zeros(B, D, dtype=dtype, requires_grad=True) for _ in range(2))
    first = elbo(model.generative, (DiagonalGaussian(mu, log_sigma),), x, mask, noise[0]).elbo
    grad = torch.autograd.grad(first.sum(), (mu, log_sigma))
    assert_close(trace[0].elbo, first.detach())
    assert_close((trace[0].grad_mu, trace[0].grad_log_sigma), (grad[0].abs().mean(), grad[1].abs().mean()))
    assert not any(value.requires_grad for seen in trace for value in (seen.elbo, seen.log_likelihood, seen.grad_mu))


def test_gradients_are_summed_over_rows(batch: tuple[Tensor, Tensor, list[Noise]], dtype: torch.dtype) -> None:
    model, (x, mask, noise) = model_of(ITERATIVE["gradients"], dtype), batch
    draws = iter(noise)
    accumulate(model, x, mask, K, lambda: next(draws))
    together = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad(set_to_none=True)
    for i in range(B):
        draws = iter([(draw[0][i : i + 1],) for draw in noise])
        accumulate(model, x[i : i + 1], mask[i : i + 1], K, lambda draws=draws: next(draws))  # type: ignore[misc]
    assert_close([parameter.grad for parameter in model.parameters()], together, atol=1e-4 if dtype == torch.float32 else 1e-10, rtol=1e-4)


def test_fresh_noise_has_one_standard_normal_array_per_level(device: torch.device, generator: torch.Generator) -> None:
    noise = fresh_noise((3, 5), 1000, 4, False, device, generator)
    assert [level.shape for level in noise] == [(1000, 4, 3), (1000, 4, 5)]
    assert all(abs(float(level.mean())) < 0.05 and abs(float(level.std()) - 1) < 0.05 for level in noise)
    again = fresh_noise((3, 5), 1000, 4, False, device, generator)
    assert not torch.equal(noise[0], again[0])


def test_antithetic_noise_comes_in_pairs(device: torch.device, generator: torch.Generator) -> None:
    (noise,) = fresh_noise((3,), 10, 6, True, device, generator)
    assert noise.shape == (10, 6, 3)
    assert torch.equal(noise[:, 1::2], -noise[:, ::2])
    assert not torch.equal(noise[:, 0], noise[:, 2])


def test_an_odd_number_of_antithetic_samples_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="samples: 3 is odd"):
        fresh_noise((3,), 10, 3, True, device, None)
