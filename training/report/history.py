"""What a run's log says: |∇λ L| at each refinement step, and validation ELBO, by epoch (Marino 2018, Fig. 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class History:
    """One entry an epoch; inner lists are by refinement step, 0 … K.

    Attributes:
        grad_mu, grad_log_sigma: mean absolute entry of ∇μ L and ∇log σ L over the epoch's training rows, in nats per unit.
        valid_elbo: mean over validation rows, nats.
    """

    epochs: list[int]
    grad_mu: list[list[float]]
    grad_log_sigma: list[list[float]]
    valid_elbo: list[list[float]]

    @property
    def trained_steps(self) -> int:
        """K."""
        return len(self.valid_elbo[-1]) - 1


def history(log: Sequence[dict[str, Any]]) -> History:
    """From the entries of log.jsonl. Raises ValueError if there are none."""
    if not log:
        raise ValueError("log.jsonl: no entries")
    columns = {name: [entry[name] for entry in log] for name in ("grad_mu", "grad_log_sigma", "valid_elbo")}
    return History(epochs=[entry["epoch"] for entry in log], **columns)
