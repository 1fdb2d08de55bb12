"""What a frame's result says depends on that frame alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from service.streams.results import Shaper


def test_a_frames_quantile_is_that_of_its_own_steps() -> None:
    quantiles = SimpleNamespace(steps=(0, 2), probabilities=(0.0, 1.0), elbo=((-100.0, 0.0), (-20.0, -10.0)))
    card: Any = SimpleNamespace(quantiles=quantiles)
    shaper = Shaper(card)
    elbo, used = np.array([-15.0, -60.0, -12.0, -30.0]), [2, 0, 2, 0]
    together = shaper._surprise_quantiles(elbo, used)
    assert together == [shaper._surprise_quantiles(elbo[i : i + 1], used[i : i + 1])[0] for i in range(4)]
    assert together == [0.5, 0.6, 0.2, 0.3]
