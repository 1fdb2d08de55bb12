"""Frames that come without a connection: a body becomes settings and arrays, a finished portion the next snapshot."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service import arrays
from service.repository import ServedModel
from service.schemas import FilterBody
from service.streams.opening import checked_steps, refuse_foreign
from service.streams.stream import Portion
from service.streams.tokens import Snapshot, Tokens

FRESH = {"frames": 0, "nats": 0.0, "lag_ms_max": 0.0, "lag_ms_sum": 0.0}
"""The summary of a sequence that has no frame yet."""


@dataclass(frozen=True)
class Frames:
    """What a body says. `settings` is what a token repeats; `snapshot` where the sequence goes on from; x, mask: (n, X)."""

    settings: dict[str, Any]
    snapshot: Snapshot | None
    x: NDArray[np.float32]
    mask: NDArray[np.float32] | None


def read_frames(body: FilterBody, model: ServedModel, tokens: Tokens, key_id: str, max_rows: int) -> Frames:
    """The frames and settings of `body`, completed from its state and from the model.

    Raises:
        InvalidInput: a field does not fit the model. TokenRefused: as `Tokens.read`.
    """
    x = arrays.read_rows(body.frames, "frames", model.card.x, max_rows)
    mask = None if body.mask is None else arrays.read_mask(body.mask, model.card.x, len(x)).reshape(len(x), -1)
    snapshot = None if body.state is None else tokens.read(body.state, model.sha256, key_id)
    return Frames(settings_for(body, model, snapshot), snapshot, x.reshape(len(x), -1), mask)


def snapshot_after(portion: Portion, settings: Mapping[str, Any], summary: Mapping[str, float]) -> Snapshot:
    """Where the sequence stands after a portion that wanted the state. `summary`: before it."""
    assert portion.state is not None, "the portion wanted the state"
    frame = portion.first_frame + len(portion.x)
    nats = summary["nats"] + float(np.nansum(portion.elbo))
    return Snapshot(settings, frame, frame, {**summary, "frames": summary["frames"] + len(portion.x), "nats": nats}, portion.state)


def settle(done: asyncio.Future[Portion]) -> Callable[[Portion], None]:
    """What a stream does with its only portion."""

    def settled(portion: Portion) -> None:
        if not done.done():
            done.set_result(portion)

    return settled


def settings_for(body: FilterBody, model: ServedModel, snapshot: Snapshot | None) -> dict[str, Any]:
    """What a token repeats, completed from the state and the model.

    Raises:
        InvalidInput: too many steps. TokenRefused: the state has samples waiting for their frame.
    """
    before = {} if snapshot is None else dict(snapshot.settings)
    if snapshot is not None:
        refuse_foreign(snapshot)
    steps = body.steps if body.steps is not None else before.get("steps", model.card.trained_steps)
    return {
        "sample_rate": model.card.x.sample_rate,
        "encoding": "json",
        "steps": checked_steps(steps, model.card),
        "seed": before.get("seed", 0) if body.seed is None else body.seed,
        "elastic": bool(body.elastic),
        "token_every": 0,
        "return": list(dict.fromkeys(("elbo", "surprise", *body.parts))),
    }
