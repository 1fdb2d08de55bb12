"""What a model without memory reaches: the figure every trained filter must beat, printed by `elbow-train data check`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from training.data.ragged import Ragged


@dataclass(frozen=True)
class Baseline:
    """Negative log-likelihood in nats per frame: `frame` = total / frames, `sequence` = mean of the sequences' means."""

    frame: float
    sequence: float


def marginal_bernoulli(train: Ragged, part: Ragged) -> Baseline:
    """Independent Bernoulli per entry, p = (training count + ½) / (training frames + 1); every frame of `part` scored.

    The smoothing keeps notes that training never plays possible: MuseData's validation split has some.
    """
    p = (train.joined.sum(axis=0, dtype=np.float64) + 0.5) / (train.frames + 1)
    # Σ_x −[x log p + (1 − x) log(1 − p)] = −x · logit(p) − Σ log(1 − p)
    nll = -(part.joined @ (np.log(p) - np.log1p(-p))) - np.log1p(-p).sum()
    per_sequence = np.add.reduceat(nll, part.offsets[:-1]) / part.lengths
    return Baseline(float(nll.mean()), float(per_sequence.mean()))
