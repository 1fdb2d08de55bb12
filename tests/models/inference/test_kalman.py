"""The exact filter as an inference model: the oracle's numbers, frame by frame, and what it may be asked of."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.testing import assert_close

from models.architecture import FilterArchitecture, KalmanArchitecture, LinearGaussianArchitecture, VRNNArchitecture
from models.catalogue import FilterModel, build_filter, infer_with
from models.filtering import filter_sequence
from models.generative.linear_gaussian import LinearGaussian
from models.kalman import kalman_filter
from tests.models.small_filters import linear_system
from training.sequence_step import Chunk, accumulate_sequence

SIZES = pytest.mark.parametrize(("latent", "x_size"), [(1, 1), (1, 3), (2, 2), (3, 4)])


@SIZES
def test_every_frame_is_the_oracles(latent: int, x_size: int, generator: torch.Generator) -> None:
    system = linear_system(latent, x_size)
    model = LinearGaussian.of(system)
    model.set_statistics(torch.tensor(0.3), torch.tensor(1.7))  # networks read standardised frames, the exact filter the frames
    _, x = system.simulate(4, 12, generator)
    mask = (torch.rand(x.shape, generator=generator) < 0.8).to(x.dtype)
    mask[1, 4] = 0
    exact = kalman_filter(system, x, mask)
    zero = torch.zeros(4, 1, latent, dtype=x.dtype)
    out = filter_sequence(model, infer_with(model, KalmanArchitecture()), x, mask, lambda _: ([], (zero,)))
    assert_close(out.q.mu, exact.mean, rtol=0, atol=1e-9)
    best = 1 / torch.linalg.inv(exact.covariance).diagonal(dim1=-2, dim2=-1)
    seen = mask.sum(-1) > 0
    assert_close(torch.exp(2 * out.q.log_sigma)[seen], best[seen], rtol=1e-9, atol=1e-9)
    assert_close(out.state["V"].reshape(4, latent, latent), exact.covariance[:, -1])
    assert bool((out.elbo <= exact.log_likelihood + 1e-9).all())
    if latent == 1:
        assert_close(out.elbo, exact.log_likelihood, rtol=0, atol=1e-9)


def test_training_it_is_maximum_likelihood(generator: torch.Generator) -> None:
    """Through time, in one dimension: the gradient of the exact log-likelihood, which the oracle differentiates too."""
    system = linear_system(1, 2)
    model = FilterModel(LinearGaussian.of(system), torch.nn.Identity())  # type: ignore[arg-type]
    model.inference = infer_with(model.generative, KalmanArchitecture())
    _, x = system.simulate(3, 6, generator)
    ones = torch.ones_like(x)
    noise = torch.zeros(6, 1, 3, 1, 1, dtype=x.dtype)
    accumulate_sequence(model, Chunk(x, ones, torch.ones(3, 6, dtype=x.dtype), noise), 1.0)
    twin = copy.deepcopy(model)
    twin.zero_grad()
    (-kalman_filter(twin.generative.system(), x, ones).log_likelihood.sum()).backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


def test_it_has_no_parameters_of_its_own_and_follows_its_model() -> None:
    model = build_filter(FilterArchitecture(LinearGaussianArchitecture(3, 2), KalmanArchitecture()), seed=0)
    assert list(model.inference.parameters()) == []
    twin = copy.deepcopy(model)
    x, past = torch.ones(2, 3), torch.cat([torch.zeros(2, 2), torch.eye(2).reshape(1, 4).expand(2, 4)], -1)
    before = twin.inference.context(x, x, past)["mean"].clone()
    with torch.no_grad():
        twin.generative.C.mul_(2)
    assert not torch.allclose(twin.inference.context(x, x, past)["mean"], before)
    assert torch.equal(model.inference.context(x, x, past)["mean"], before)
    with pytest.raises(ValueError, match="past: the Kalman filter needs the prediction"):
        model.inference.context(x, x)


def test_it_is_exact_for_one_model_only() -> None:
    with pytest.raises(ValueError, match="exact for the linear-Gaussian model, and for no other"):
        build_filter(FilterArchitecture(VRNNArchitecture(5, 2, 4), KalmanArchitecture()))
    assert FilterArchitecture.from_dict(FilterArchitecture(LinearGaussianArchitecture(), KalmanArchitecture()).to_dict()) == (
        FilterArchitecture(LinearGaussianArchitecture(), KalmanArchitecture())
    )
