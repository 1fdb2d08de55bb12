"""What a run's log says: |∇λ L| at each refinement step, and validation ELBO, by epoch (Marino 2018, Fig. 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class History:
    """One entry an epoch; inner lists are by refinement step, 0 … K, of a training in phases by those that every phase has.

    Attributes:
        grad_mu, grad_log_sigma: mean absolute entry of ∇μ L and ∇log σ L over the epoch's training rows, in nats per unit.
        valid_elbo: mean over validation rows, nats.
        phases: name and first epoch of every run of which one began with the weights of the one before.
        trained_steps: K of each phase.
    """

    epochs: list[int]
    grad_mu: list[list[float]]
    grad_log_sigma: list[list[float]]
    valid_elbo: list[list[float]]
    phases: list[tuple[str, int]]
    trained_steps: list[int]

    @property
    def steps(self) -> int:
        """The steps that every phase has."""
        return min(self.trained_steps)


def history(log: Sequence[dict[str, Any]]) -> History:
    """From the entries of log.jsonl. Raises ValueError if there are none."""
    if not log:
        raise ValueError("log.jsonl: no entries")
    phases: dict[str, int] = {}
    steps: dict[str, int] = {}
    for entry in log:
        phases.setdefault(entry.get("run", ""), entry["epoch"])
        steps[entry.get("run", "")] = len(entry["valid_elbo"]) - 1
    common = min(steps.values()) + 1
    columns = {name: [entry[name][:common] for entry in log] for name in ("grad_mu", "grad_log_sigma", "valid_elbo")}
    return History([entry["epoch"] for entry in log], **columns, phases=list(phases.items()), trained_steps=list(steps.values()))
