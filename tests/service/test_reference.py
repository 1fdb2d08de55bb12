"""The drift signal equals the quantile that a score reports."""

from __future__ import annotations

import math

import numpy as np
import pytest

from models.artifact import Quantiles
from service.reference import Reference
from service.replies import elbo_quantile

QUANTILES = Quantiles(probabilities=(0.01, 0.5, 0.99), steps=(0, 5), elbo=((-300.0, -200.0, -100.0), (-110.0, -90.0, -70.0)))


@pytest.mark.parametrize("steps", [0, 1, 3, 5, 64])
def test_it_is_the_quantile_of_a_score(steps):
    reference = Reference(QUANTILES)
    for elbo in np.linspace(-320, -50, 100):
        assert reference.quantile(steps, elbo) == pytest.approx(elbo_quantile(QUANTILES, steps, elbo), abs=1e-12)


def test_there_is_none_for_what_is_not_finite_or_not_on_the_card():
    assert Reference(QUANTILES).quantile(0, math.nan) is None
    assert Reference(Quantiles(probabilities=(), steps=(), elbo=())).quantile(0, -1.0) is None
