"""How a stream is opened: settings from the query or from the first message, checked, completed and said back in full."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from models.artifact import Card
from service.errors import InvalidInput, TokenRefused
from service.repository import ServedModel
from service.schemas import DEFAULT_STREAM_PARTS, Body, Count, Seed, StreamPart, read_body_fields
from service.streams.audio import ENCODINGS, AudioInput
from service.streams.stream import PARTS, StreamSpec
from service.streams.tokens import Snapshot, Tokens

JSON = "json"


class OpenBody(Body):
    """The first message of a stream; the same keys may come as query parameters instead."""

    type: Literal["open"] = "open"
    sample_rate: Count | None = Field(None, description="Hz, of the audio that will be sent; default: the model's")
    encoding: str | None = Field(None, description="pcm_s16le, pcm_f32le, mulaw, or json for frames as lists of numbers")
    steps: Count | None = Field(None, description="refinement steps per frame; default: the trained number")
    seed: Seed | None = Field(None, description="of all noise of the stream; default: drawn by the server and said back")
    elastic: bool | None = Field(None, description="fewer steps are acceptable when the stream lags behind real time")
    token_every: Count | None = Field(None, description="a state token at least every so many frames; 0: none")
    parts: list[StreamPart] | None = Field(None, alias="return", description="what each result holds besides elbo and surprise")
    state: str | None = Field(None, description="a state token: go on from there")


@dataclass(frozen=True)
class Opened:
    """A stream as the server applies it. `settings` is what a token repeats; `audio` None where frames come as JSON."""

    settings: dict[str, Any]
    spec: StreamSpec
    audio: AudioInput | None
    snapshot: Snapshot | None


MOST_DIGITS = 20
"""Of a number in the query: as many as 2**64 - 1 has."""


def from_query(query: Mapping[str, str]) -> dict[str, Any]:
    """Query parameters as the JSON they stand for: numbers and booleans as such, `return` as a list.

    Raises:
        InvalidInput: a number that is none.
    """
    given: dict[str, Any] = {}
    for name, text in query.items():
        if name in ("sample_rate", "steps", "seed", "token_every"):
            if not (text.isascii() and text.isdecimal() and len(text) <= MOST_DIGITS):
                raise InvalidInput.at(name, f'must be a whole number of at least 0 and at most {MOST_DIGITS} digits, not "{text[:40]}"')
            given[name] = int(text)
        elif name == "elastic" and text in ("true", "false"):
            given[name] = text == "true"
        elif name == "return":
            given[name] = [part for part in text.split(",") if part]
        else:
            given[name] = text
    return given


def open_with(given: dict[str, Any], model: ServedModel, tokens: Tokens, key_id: str) -> Opened:
    """Settings completed from the token, if there is one, and from the model.

    Raises:
        InvalidInput: a key is unknown, a value out of bounds, or not what the token's stream had.
        TokenRefused: as `Tokens.read`.
    """
    body, card = read_body_fields(OpenBody, given), model.card
    snapshot = None if body.state is None else tokens.read(body.state, model.sha256, key_id)
    before = dict(snapshot.settings) if snapshot else {}
    rate, encoding = _format(body, card, before)
    seed = _kept("seed", body.seed, before, secrets.randbelow(2**32))
    settings = {
        "sample_rate": rate,
        "encoding": encoding,
        "steps": checked_steps(_chosen(body.steps, before.get("steps"), card.trained_steps), card),
        "seed": seed,
        "elastic": _chosen(body.elastic, before.get("elastic"), False),
        "token_every": _chosen(body.token_every, before.get("token_every"), 0),
        "return": [part for part in PARTS if part in {*DEFAULT_STREAM_PARTS, *_chosen(body.parts, before.get("return"), [])}],
    }
    audio = None
    if rate is not None and encoding != JSON:
        assert card.x.sample_rate is not None
        audio = AudioInput(rate, encoding, card.x.sample_rate, card.x.size)
    if snapshot is not None and (audio is None) != (not snapshot.audio):
        raise InvalidInput.at("encoding", f"the token's stream had {before.get('encoding')}: go on with that")
    if audio is not None and snapshot is not None:
        audio.restore(dict(snapshot.audio))
    frame_s = card.x.size / card.x.sample_rate if card.x.sample_rate else 0.0
    return Opened(settings, spec_of(settings, frame_s, snapshot), audio, snapshot)


def spec_of(settings: Mapping[str, Any], frame_s: float, snapshot: Snapshot | None) -> StreamSpec:
    return StreamSpec(
        steps=settings["steps"],
        seed=settings["seed"],
        elastic=settings["elastic"],
        parts=frozenset(settings["return"]),
        frame_s=frame_s,
        state=snapshot.state if snapshot else None,
        frame=snapshot.frame if snapshot else 0,
    )


def checked_steps(steps: int, card: Card) -> int:
    """`steps`, if the model takes so many per frame; a model with a filter of its own takes none whatever is asked.

    Raises:
        InvalidInput: too many.
    """
    if not card.iterative:
        return 0
    if steps > card.max_steps:
        raise InvalidInput.at("steps", f"must be at most {card.max_steps} for this model, not {steps}")
    return steps


def _format(body: OpenBody, card: Card, before: Mapping[str, Any]) -> tuple[int | None, str]:
    """Sample rate (None without audio) and encoding."""
    if card.x.sample_rate is None:
        if body.sample_rate is not None:
            raise InvalidInput.at("sample_rate", "this model's frames are no audio: leave it out")
        if body.encoding not in (None, JSON):
            raise InvalidInput.at("encoding", f'this model takes "{JSON}" only: {{"type": "frames", "frames": [[…]]}} messages')
        return None, JSON
    encoding = _chosen(body.encoding, before.get("encoding"), "pcm_s16le")
    if encoding not in (*ENCODINGS, JSON):
        raise InvalidInput.at("encoding", f'"{encoding[:40]}" is unknown: one of {", ".join((*ENCODINGS, JSON))}')
    rate = _kept("sample_rate", body.sample_rate, before, card.x.sample_rate)
    if encoding == JSON and rate != card.x.sample_rate:
        raise InvalidInput.at("sample_rate", f"JSON frames are not resampled: send them at {card.x.sample_rate} Hz")
    return rate, encoding


def _kept(name: str, given: int | None, before: Mapping[str, Any], otherwise: int) -> int:
    """A setting that a stream cannot change on its way."""
    if name not in before or before[name] is None:
        return otherwise if given is None else given
    if given is not None and given != before[name]:
        raise InvalidInput.at(name, f"the token's stream has {before[name]}, which cannot change to {given} on its way")
    return int(before[name])


def _chosen(*candidates: Any) -> Any:
    return next(value for value in candidates if value is not None)


def refuse_foreign(snapshot: Snapshot) -> None:
    """A stateless call takes frames, so a token with samples waiting for their frame would lose them.

    Raises:
        TokenRefused: it is such a token.
    """
    if snapshot.audio and not AudioInput.between_frames(snapshot.audio):
        raise TokenRefused(
            "state: samples of audio wait in this token for the rest of their frame, or for their resampler: "
            "open a WebSocket stream with it, or take one between two frames of a stream at the model's own rate"
        )
