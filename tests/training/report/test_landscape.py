"""The landscape against densities computed directly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal

from training.data.catalogue import load
from training.report.landscape import grid, landscape
from training.report.subject import Subject, validation_rows


@pytest.fixture
def subject(trained: Callable[[str], Path]) -> Subject:
    return Subject.load(trained("z2"))


@pytest.fixture
def x(subject: Subject) -> Tensor:
    return validation_rows(load(subject.run.data.name), 6, "bernoulli", torch.device("cpu"))


def test_the_grid_holds_log_p_of_x_and_z_with_z1_along_the_second_axis(subject: Subject, x: Tensor) -> None:
    axis, values = grid(subject.model.generative, x[:1], spacing=0.5, quiet=True)
    assert values.shape == (21, 21)
    z = torch.tensor([axis[13], axis[4]], dtype=torch.float32)
    logits = subject.model.generative((z.reshape(1, 1, 2),)).parameters["logits"][0, 0]
    expected = Bernoulli(logits=logits).log_prob(x[0]).sum() + Normal(0.0, 1.0).log_prob(z).sum()
    assert values[4, 13] == pytest.approx(float(expected), rel=1e-5)


def test_paths_start_at_the_prior_and_climb(subject: Subject, x: Tensor) -> None:
    data = landscape(
        subject.model, subject.run.refinement, x, 1, (28, 28), tuning=x[2:], count=5, spacing=0.5, rates=(0.1, 0.01), quiet=True
    )
    for path in (data.learned, data.ascent):
        assert path.mu.shape == (6, 2)
        assert path.mu[0].tolist() == [0, 0]
        assert path.elbo[-1] > path.elbo[0]
    assert data.learned.rate is None
    assert data.ascent.rate in (0.1, 0.01)
    column, row = (int(np.flatnonzero(np.isclose(data.axis, value))[0]) for value in data.peak)
    assert data.log_joint[row, column] == data.log_joint.max()
    np.testing.assert_array_equal(data.x, x[1].numpy())


def test_only_a_two_dimensional_z_can_be_drawn(trained: Callable[[str], Path], x: Tensor) -> None:
    other = Subject.load(trained("iterative"))
    with pytest.raises(ValueError, match=r"z of sizes \(4,\)"):
        landscape(other.model, other.run.refinement, x, 0, (28, 28), tuning=x[1:])
