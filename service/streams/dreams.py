"""Sequences drawn from a filter's generative model: `generate`, from the beginning or on from a state."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from service.errors import InvalidInput
from service.jobs import spread
from service.repository import ServedModel
from service.schemas import DreamBody, FilterBody
from service.streams.opening import spec_of
from service.streams.stateless import FRESH, Frames, settings_for, snapshot_after
from service.streams.stream import Portion, StreamSpec
from service.streams.tokens import Tokens


def read_dreams(body: DreamBody, model: ServedModel, tokens: Tokens, key_id: str, max_rows: int, most: int) -> list[Frames]:
    """What each sequence of `body` begins with; its frames are blank, and only their number counts. `most`: sequences at once.

    Raises:
        InvalidInput: too many frames, or sequences. TokenRefused: as `Tokens.read`, or the state has samples waiting for their frame.
    """
    if body.count > most:
        raise InvalidInput.at("count", f"must be at most {most}, the streams that this server steps at once, not {body.count}")
    if body.count * body.frames > max_rows:
        raise InvalidInput.at("frames", f"must be at most {max_rows} over all sequences, not {body.count} x {body.frames}")
    snapshot = None if body.state is None else tokens.read(body.state, model.sha256, key_id)
    blank = np.zeros((body.frames, model.card.x.size), np.float32)
    # as for frames that are filtered: whoever goes on from the state after a dream may filter what comes next
    first = body.seed if body.seed is not None else 0 if snapshot is None else int(snapshot.settings.get("seed", 0))
    bodies = [FilterBody.model_validate({"frames": [], "seed": seed}) for seed in spread(first, body.count).tolist()]
    return [Frames(settings_for(one, model, snapshot), snapshot, blank, None) for one in bodies]


def dream_spec(frames: Frames) -> StreamSpec:
    """Of the stream that draws one of them."""
    return replace(spec_of(frames.settings, 0.0, frames.snapshot), dreams=True)


def dream_result(portion: Portion, frames: Frames, model: ServedModel, tokens: Tokens, key_id: str) -> dict[str, Any]:
    """One sequence: its frames as drawn, the mean of each one's prediction, and the state after the last."""
    after = snapshot_after(portion, frames.settings, frames.snapshot.summary if frames.snapshot else FRESH)
    shape = (-1, *model.card.x.shape)
    return {
        "frame": portion.first_frame,
        "frames": np.stack([shown["x"] for shown in portion.shown]).reshape(shape),
        "mean": np.stack([shown["mean"] for shown in portion.shown]).reshape(shape),
        "state": tokens.issue(after, model.sha256, key_id),
    }
