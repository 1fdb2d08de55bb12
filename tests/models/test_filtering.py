"""The sequence loop: what a missing frame does, that rows and chunks do not matter, and its optimum on a solvable model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from models.architecture import OptimiserArchitecture
from models.catalogue import FilterModel, infer_with
from models.filtering import FilteredSequence, FrameNoise, filter_sequence, random_noise
from models.generative.linear_gaussian import LinearGaussian
from models.kalman import kalman_filter
from tests.models.small_filters import GENERATIVE, INFERENCE, frames, linear_system, small_filter

B, T, K, S = 3, 6, 2, 2

EVERY = pytest.mark.parametrize("generative", GENERATIVE)
EVERY_INFERENCE = pytest.mark.parametrize("inference", INFERENCE)


def noise_for(model: FilterModel, generator: torch.Generator, frames: int = T) -> Tensor:
    """(T, K + 1, B, S, D)."""
    return torch.randn(frames, K + 1, B, S, model.generative.latent_sizes[0], generator=generator, dtype=model.generative.x_mean.dtype)


def use(noise: Tensor) -> FrameNoise:
    return lambda t: ([(part,) for part in noise[t, :-1]], (noise[t, -1],))


def run(model: FilterModel, x: Tensor, mask: Tensor, noise: Tensor, state: dict[str, Tensor] | None = None) -> FilteredSequence:
    return filter_sequence(model.generative, model.inference, x, mask, use(noise), state)


@EVERY
@EVERY_INFERENCE
def test_every_pair_of_models_filters(generative: str, inference: str, generator: torch.Generator) -> None:
    model = small_filter(generative, inference)
    x, mask = frames(model.generative, B, T, generator)
    out = run(model, x, mask, noise_for(model, generator))
    steps = K if model.inference.refines else 0
    assert out.trace.shape == (B, T, steps + 1)
    assert out.elbo.shape == out.kl.shape == (B, T)
    assert out.q.mu.shape == (B, T, model.generative.latent_sizes[0])
    assert out.reconstruction.shape == x.shape
    assert_close(out.trace[..., -1], out.elbo)
    assert bool(torch.isfinite(out.trace).all())
    assert not out.trace.requires_grad


@EVERY
@EVERY_INFERENCE
def test_a_sequence_among_others_is_filtered_as_it_is_alone(generative: str, inference: str, generator: torch.Generator) -> None:
    model = small_filter(generative, inference)
    x, mask = frames(model.generative, B, T, generator)
    noise = noise_for(model, generator)
    together = run(model, x, mask, noise)
    for row in range(B):
        one = slice(row, row + 1)
        alone = run(model, x[one], mask[one], noise[:, :, one])
        assert_close(alone.trace, together.trace[one])
        assert_close(alone.state, {name: value[one] for name, value in together.state.items()})


@pytest.mark.parametrize("inference", ["avf", "own"])
@EVERY
def test_a_sequence_in_pieces_is_the_whole(generative: str, inference: str, generator: torch.Generator) -> None:
    model = small_filter(generative, inference)
    x, mask = frames(model.generative, B, T, generator)
    noise = noise_for(model, generator)
    whole = run(model, x, mask, noise)
    first = run(model, x[:, :2], mask[:, :2], noise[:2])
    rest = run(model, x[:, 2:], mask[:, 2:], noise[2:], first.state)
    assert_close(torch.cat([first.trace, rest.trace], 1), whole.trace)
    assert_close(rest.state, whole.state)


@EVERY
@EVERY_INFERENCE
def test_a_missing_frame_keeps_the_prediction_and_feeds_its_mean_on(generative: str, inference: str, generator: torch.Generator) -> None:
    model = small_filter(generative, inference)
    x, mask = frames(model.generative, B, T, generator)
    noise, gap = noise_for(model, generator), T // 2
    out = run(model, x, mask, noise)
    # nothing was observed: no evidence, λ = prior, nothing to pay
    assert_close(out.q.mu[0, gap], out.prior.mu[0, gap])
    assert_close(out.q.log_sigma[0, gap], out.prior.log_sigma[0, gap])
    assert not out.log_likelihood[0, gap].any()
    if generative != "linear gaussian":
        assert_close(out.trace[0, gap], torch.zeros_like(out.trace[0, gap]))
    # what stands in the place of the missing frame makes no difference
    other = x.clone()
    other[0, gap] = 1 - other[0, gap]
    assert_close(run(model, other, mask, noise).trace, out.trace)


@pytest.mark.parametrize("generative", ["vrnn", "srnn"])
def test_the_state_after_a_missing_frame_is_that_after_its_predicted_mean(generative: str, generator: torch.Generator) -> None:
    model = small_filter(generative, "avf")
    x = frames(model.generative, B, 1, generator)[0]
    noise = noise_for(model, generator, 1)[..., :1, :]
    missing = run(model, x, torch.zeros_like(x), noise)
    q = missing.q
    z = q.mu[:, 0] + q.log_sigma[:, 0].exp() * noise[0, -1, :, 0]
    context = model.generative.predict(model.generative.start(B)).context
    mean = model.generative.emission(context, z.unsqueeze(1)).mean[:, 0]
    with torch.no_grad():
        expected = model.generative.transition(context, mean, torch.ones_like(mean), missing.q, z)
    assert_close(missing.state, {name: value.detach() for name, value in expected.items()})


@pytest.mark.parametrize(
    ("latent", "x_size"), [(1, 1), (3, 4), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((1, 3), (2, 2)))]
)
def test_gradient_ascent_on_a_linear_gaussian_model_ends_at_the_kalman_filter(latent: int, x_size: int, generator: torch.Generator) -> None:
    system = linear_system(latent, x_size)
    generative = LinearGaussian.of(system)
    sgd = infer_with(generative, OptimiserArchitecture("sgd", learning_rate=0.08))
    _, x = system.simulate(4, 10, generator)
    mask = (torch.rand(x.shape, generator=generator) < 0.8).to(x.dtype)
    mask[1, 4] = 0
    exact = kalman_filter(system, x, mask)
    zero = torch.zeros(4, 1, latent, dtype=x.dtype)
    out = filter_sequence(generative, sgd, x, mask, lambda _: ([(zero,)] * 250, (zero,)))
    assert_close(out.q.mu, exact.mean.detach(), rtol=0, atol=1e-6)
    assert bool((out.elbo <= exact.log_likelihood + 1e-9).all())
    if latent == 1:
        assert_close(out.q.log_sigma.exp(), exact.covariance[..., 0].sqrt(), rtol=0, atol=1e-6)
        assert_close(out.elbo, exact.log_likelihood, rtol=0, atol=1e-8)
    else:
        assert_close(out.state["V"].reshape(4, latent, latent), exact.covariance[:, -1])


@pytest.mark.parametrize("generative", ["vrnn", "srnn", "linear gaussian 1-D"])
def test_conventional_optimisers_raise_the_bound_of_a_frame(generative: str, generator: torch.Generator) -> None:
    model = small_filter(generative, "adam")
    x, mask = frames(model.generative, B, T, generator)
    adam = infer_with(model.generative, OptimiserArchitecture("adam", learning_rate=0.03))
    noise = random_noise(generator, B, model.generative.latent_sizes[0], 40, samples=100)
    out = filter_sequence(model.generative.float(), adam, x.float(), mask.float(), noise)
    assert float(out.trace[..., -10:].mean()) > float(out.trace[..., 0].mean())


def test_the_trace_is_measured_by_noise_that_the_posterior_has_not_seen(generator: torch.Generator) -> None:
    model = small_filter("srnn", "avf")
    x, mask = frames(model.generative, B, 1, generator)
    noise = noise_for(model, generator, 1)
    out = run(model, x, mask, noise)
    other = noise.clone()
    other[:, 1] += 1
    # the second step's noise measures λ after the first, and changes λ only after that
    changed = run(model, x, mask, other).trace
    assert_close(changed[..., 0], out.trace[..., 0])
    assert not torch.allclose(changed[..., 1], out.trace[..., 1])
