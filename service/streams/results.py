"""What a portion looks like as JSON: one result per frame."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.artifact import Card
from service.streams.stream import Portion, StreamSpec

DECIMALS = 6
"""Of nats, in replies."""


class Shaper:
    """Makes results of one model's portions."""

    def __init__(self, card: Card):
        self._card = card
        self._steps = np.array(card.quantiles.steps)
        self._tables = [np.array(row) for row in card.quantiles.elbo]
        self._probabilities = np.array(card.quantiles.probabilities)

    def results(self, portion: Portion, spec: StreamSpec) -> list[dict[str, Any]]:
        """One dictionary per frame, in order."""
        elbo = np.round(portion.elbo, DECIMALS)
        quantiles = self._surprise_quantiles(elbo, portion.steps_used)
        surprise = (-elbo).tolist()
        finite = np.isfinite(elbo)
        results: list[dict[str, Any]] = [
            {"frame": frame, "elbo": value, "surprise": minus, "surprise_quantile": quantile, "steps_used": steps}
            for frame, value, minus, quantile, steps in zip(
                range(portion.first_frame, portion.first_frame + len(surprise)),
                elbo.tolist(),
                surprise,
                quantiles,
                portion.steps_used,
                strict=True,
            )
        ]
        if not finite.all():
            for i in np.flatnonzero(~finite).tolist():
                results[i] |= {"elbo": None, "surprise": None, "surprise_quantile": None, "stop_reason": "nonfinite"}
        if spec.elastic:
            for result in results:
                if 0 < spec.steps != result["steps_used"] and "stop_reason" not in result and not self._unseen(portion, result):
                    result["stop_reason"] = "degraded"
        for name in ("log_likelihood", "kl"):
            if name in spec.parts:
                for result, value in zip(results, np.round(getattr(portion, name), DECIMALS).tolist(), strict=True):
                    result[name] = value
        for i, shown in enumerate(portion.shown):
            results[i] |= self._shown(shown, spec)
        return results

    def _unseen(self, portion: Portion, result: Mapping[str, Any]) -> bool:
        """Whether the frame was lost: it takes no steps, and nothing was given up."""
        return portion.mask is not None and not portion.mask[result["frame"] - portion.first_frame].any()

    def _surprise_quantiles(self, elbo: NDArray[np.float64], used: list[int]) -> list[float | None]:
        """The share of training frames that were less surprising, after the nearest number of steps."""
        if not self._tables:
            return [None] * len(elbo)
        taken, found = np.asarray(used), np.empty(len(elbo))
        for steps in set(used):
            frames, table = taken == steps, self._tables[int(np.abs(self._steps - steps).argmin())]
            found[frames] = 1 - np.interp(elbo[frames], table, self._probabilities)
        quantiles: list[float | None] = np.round(found, DECIMALS).tolist()
        return quantiles

    def _shown(self, shown: Mapping[str, NDArray[Any]], spec: StreamSpec) -> dict[str, Any]:
        parts: dict[str, Any] = {}
        if "posterior" in spec.parts:
            levels = [{name: shown[array] for name, array in level.parameters.items()} for level in self._card.levels]
            parts["posterior"] = {"levels": levels}
        for part in ("reconstruction", "prediction"):
            if part in spec.parts:
                parts[part] = {"mean": shown[f"{part}.mean"][0]}
                if f"{part}.log_sigma" in shown:
                    parts[part]["std"] = np.exp(shown[f"{part}.log_sigma"][0])
        return parts
