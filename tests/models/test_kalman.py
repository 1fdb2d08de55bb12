"""The exact Kalman filter against an independent library's, missing entries and whole frames included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from models.generative.linear_gaussian import LinearGaussian
from models.kalman import Filtered, LinearSystem, kalman_filter
from tests.models.small_filters import linear_system

statsmodels = pytest.importorskip("statsmodels.tsa.statespace.kalman_filter", reason="an independent Kalman filter is statsmodels' own")

SIZES = pytest.mark.parametrize(("latent", "x_size"), [(1, 1), (2, 2), (3, 5)])


def by_statsmodels(system: LinearSystem, x: Tensor, mask: Tensor) -> Filtered:
    """One sequence (T, X) through statsmodels: its state at time t is our z_t, so it starts from the prediction of z_1."""
    other = statsmodels.KalmanFilter(k_endog=len(system.C), k_states=len(system.A))
    other.bind(np.where(mask.bool().numpy(), x.numpy(), np.nan))
    other["design"], other["obs_cov"] = system.C.numpy(), system.R.numpy()
    other["transition"], other["state_cov"] = system.A.numpy(), system.Q.numpy()
    other["selection"] = np.eye(len(system.A))
    first = system.A @ system.covariance @ system.A.mT + system.Q
    other.initialize_known((system.A @ system.mean).numpy(), first.numpy())
    # without this statsmodels stops updating its covariances once they hardly change
    other.tolerance = 0
    result = other.filter()
    arrays = (
        result.llf_obs,
        result.filtered_state.T,
        result.filtered_state_cov.transpose(2, 0, 1),
        result.predicted_state[:, :-1].T,
        result.predicted_state_cov[:, :, :-1].transpose(2, 0, 1),
    )
    return Filtered(*(torch.from_numpy(array.copy()) for array in arrays))


@SIZES
@pytest.mark.parametrize("missing", ["nothing", "single entries", "whole frames"])
def test_the_filter_agrees_with_statsmodels(latent: int, x_size: int, missing: str, generator: torch.Generator) -> None:
    system = linear_system(latent, x_size)
    _, x = system.simulate(3, 40, generator)
    mask = torch.ones_like(x)
    if missing == "single entries":
        mask = (torch.rand(x.shape, generator=generator) < 0.7).to(x.dtype)
    if missing == "whole frames":
        mask[:, 10:15] = 0
        mask[1, 0] = 0
    ours = kalman_filter(system, x, mask)
    for row in range(len(x)):
        theirs = by_statsmodels(system, x[row], mask[row])
        for name in ("log_likelihood", "mean", "covariance", "predicted_mean", "predicted_covariance"):
            assert_close(getattr(ours, name)[row], getattr(theirs, name), rtol=1e-9, atol=1e-9)
        assert abs(float(ours.log_likelihood[row].sum() - theirs.log_likelihood.sum())) < 1e-8


def test_the_log_likelihood_is_that_of_one_large_gaussian(generator: torch.Generator) -> None:
    system = linear_system(2, 3)
    _, x = system.simulate(4, 5, generator)
    # the joint distribution of (x_1 … x_5) is linear in (z_0, w, v): one row of the map per source of noise
    mean, covariance = system.mean, system.covariance
    powers, means, cross = [], [], {}
    for t in range(5):
        mean, covariance = system.A @ mean, system.A @ covariance @ system.A.mT + system.Q
        means.append(system.C @ mean)
        for s, earlier in enumerate(powers):
            cross[s, t] = earlier @ torch.linalg.matrix_power(system.A, t - s).mT
        powers.append(covariance)
        cross[t, t] = covariance
    joint = torch.zeros(15, 15, dtype=x.dtype)
    for (s, t), value in cross.items():
        block = system.C @ value @ system.C.mT + (system.R if s == t else 0)
        joint[3 * s : 3 * s + 3, 3 * t : 3 * t + 3] = block
        joint[3 * t : 3 * t + 3, 3 * s : 3 * s + 3] = block.mT
    expected = torch.distributions.MultivariateNormal(torch.cat(means), joint).log_prob(x.flatten(1))
    assert_close(kalman_filter(system, x, torch.ones_like(x)).log_likelihood.sum(1), expected)


def test_a_model_of_a_system_is_that_system() -> None:
    system = linear_system(2, 3)
    again = LinearGaussian.of(system).system()
    for name in ("A", "C", "Q", "R", "mean", "covariance"):
        assert_close(getattr(again, name).detach(), getattr(system, name))


def test_a_system_with_correlated_observation_noise_has_no_model() -> None:
    system = linear_system(1, 2)
    with pytest.raises(ValueError, match="R: must be diagonal"):
        LinearGaussian.of(LinearSystem(system.A, system.C, system.Q, system.R + 0.1, system.mean, system.covariance))
