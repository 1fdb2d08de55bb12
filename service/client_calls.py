"""The client's calls, one function each: arguments to a `Call`, which says what to send and how to read the reply."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import orjson
from numpy.typing import ArrayLike, NDArray

from service.client_replies import Dream, Filtered, Posterior, Reply

T = TypeVar("T")


@dataclass(frozen=True)
class Call(Generic[T]):
    """One HTTP call and how to read its reply."""

    method: str
    path: str
    parse: Callable[[Any], T]
    body: Mapping[str, Any] | None = None

    @property
    def content(self) -> bytes | None:
        if self.body is None:
            return None
        given = {name: value for name, value in self.body.items() if value is not None}
        return orjson.dumps(given, option=orjson.OPT_SERIALIZE_NUMPY)


class Target:
    """Which model a client's calls are about, unless they name another, and which version of it."""

    def __init__(self, model: str | None, version: str | None):
        self.model, self.version = model, version

    def path(self, call: str, model: str | None) -> str:
        """Where `call` of a model is; the client's version is that of its own model, or of any if it has none.

        Raises:
            ValueError: no model is named, or another one than that to which the client's version belongs.
        """
        name = model or self.model
        if name is None:
            raise ValueError("model: name one, in the call or when making the client; models() lists them")
        if self.version is None:
            return f"/v1/models/{name}{call}"
        if self.model not in (None, name):
            raise ValueError(
                f"model: the version {self.version} of this client is one of {self.model}; "
                f"make another client for {name}, with model={name!r} and, unless the newest is meant, its version"
            )
        return f"/v1/models/{name}/versions/{self.version}{call}"


def models(client: Target, /) -> Call[list[dict[str, Any]]]:
    """The models served, newest versions."""
    return Call("GET", "/v1/models", lambda raw: list(raw["models"]))


def card(client: Target, /, model: str | None = None) -> Call[dict[str, Any]]:
    """The card of a model: what x is, its levels, its trade-off curve."""
    return Call("GET", client.path("", model), dict)


def curve(client: Target, /, model: str | None = None) -> Call[dict[str, Any]]:
    """ELBO against steps, and milliseconds per batch size on this server."""
    return Call("GET", client.path("/curve", model), dict)


def encode(
    client: Target,
    /,
    inputs: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    steps: int | None = None,
    deadline_ms: float | None = None,
    tolerance: float | None = None,
    elastic: bool | None = None,
    seed: int | Sequence[int] = 0,
    samples: int = 1,
    returns: str | Sequence[str] = ("posterior", "elbo"),
    model: str | None = None,
) -> Call[Reply]:
    """Posteriors of `inputs` (R, *X); see the server's /docs for the budget fields."""
    body = {
        "inputs": _rows(inputs, "inputs"),
        "mask": None if mask is None else _rows(mask, "mask"),
        "steps": steps,
        "deadline_ms": deadline_ms,
        "tolerance": tolerance,
        "elastic": elastic,
        "seed": seed,
        "samples": samples,
        "return": listed(returns),
    }
    return Call("POST", client.path("/encode", model), Reply.parse, body)


def refine(
    client: Target, /, inputs: ArrayLike, posteriors: Sequence[Posterior], *, model: str | None = None, **options: Any
) -> Call[Reply]:
    """Goes on from `posteriors`, one per row; options as of `encode`."""
    body = dict(encode(client, inputs, model=model, **options).body or {})
    body["posterior"] = [posterior.as_json() for posterior in posteriors]
    return Call("POST", client.path("/refine", model), Reply.parse, body)


def reconstruct(
    client: Target,
    /,
    inputs: ArrayLike | None = None,
    *,
    posteriors: Sequence[Posterior] | None = None,
    mask: ArrayLike | None = None,
    steps: int | None = None,
    deadline_ms: float | None = None,
    tolerance: float | None = None,
    elastic: bool | None = None,
    seed: int | Sequence[int] = 0,
    samples: int = 0,
    model: str | None = None,
) -> Call[Reply]:
    """Mean of p(x|z), and `samples` draws of x, from `inputs` (encoded first) or from `posteriors`."""
    body = {
        "inputs": None if inputs is None else _rows(inputs, "inputs"),
        "posterior": None if posteriors is None else [posterior.as_json() for posterior in posteriors],
        "mask": None if mask is None else _rows(mask, "mask"),
        "steps": steps,
        "deadline_ms": deadline_ms,
        "tolerance": tolerance,
        "elastic": elastic,
        "seed": seed,
        "samples": samples,
    }
    return Call("POST", client.path("/reconstruct", model), Reply.parse, body)


def score(
    client: Target,
    /,
    inputs: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    steps: int | None = None,
    deadline_ms: float | None = None,
    tolerance: float | None = None,
    elastic: bool | None = None,
    seed: int | Sequence[int] = 0,
    samples: int = 100,
    model: str | None = None,
) -> Call[Reply]:
    """Importance-weighted log p(x) by `samples` samples, and the ELBO's quantile among training rows."""
    body = {
        "inputs": _rows(inputs, "inputs"),
        "mask": None if mask is None else _rows(mask, "mask"),
        "steps": steps,
        "deadline_ms": deadline_ms,
        "tolerance": tolerance,
        "elastic": elastic,
        "seed": seed,
        "samples": samples,
    }
    return Call("POST", client.path("/score", model), Reply.parse, body)


def generate(
    client: Target,
    /,
    count: int = 1,
    *,
    seed: int = 0,
    between: tuple[Posterior, Posterior] | None = None,
    samples: int = 0,
    model: str | None = None,
) -> Call[Reply]:
    """`count` draws from the prior, or points on the line between two posteriors; of static models."""
    ends = None if between is None else [posterior.as_json() for posterior in between]
    body = {"count": count, "seed": seed, "between": ends, "samples": samples}
    return Call("POST", client.path("/generate", model), Reply.parse, body)


def dream(
    client: Target, /, frames: int, *, count: int = 1, seed: int | None = None, state: str | None = None, model: str | None = None
) -> Call[list[Dream]]:
    """`count` sequences of so many frames drawn from a filter's model: from the beginning, or on from a state (`generate` of a filter).
    Without a `seed` a sequence goes on with the noise of the state's."""
    body = {"frames": frames, "count": count, "seed": seed, "state": state}
    return Call("POST", client.path("/generate", model), lambda raw: [Dream.parse(result) for result in raw["results"]], body)


def filter(
    client: Target,
    /,
    frames: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    state: str | None = None,
    steps: int | None = None,
    elastic: bool | None = None,
    seed: int | None = None,
    returns: str | Sequence[str] = ("elbo", "surprise"),
    model: str | None = None,
) -> Call[Filtered]:
    """Filters `frames` (T, *X) of a sequence: from its beginning, or on from the `state` of an earlier reply."""
    body = {
        "frames": _rows(frames, "frames"),
        "mask": None if mask is None else _rows(mask, "mask"),
        "state": state,
        "steps": steps,
        "elastic": elastic,
        "seed": seed,
        "return": listed(returns),
    }
    return Call("POST", client.path("/filter", model), Filtered.parse, body)


def followed(client: Target, inputs: ArrayLike, posteriors: Sequence[Posterior] | None, options: Mapping[str, Any]) -> Call[Reply]:
    """The call whose events are told."""
    return encode(client, inputs, **options) if posteriors is None else refine(client, inputs, posteriors, **options)


def listed(returns: str | Sequence[str]) -> list[str]:
    """As the list that `return` is; a single part may be given by itself."""
    return [returns] if isinstance(returns, str) else list(returns)


def _rows(values: ArrayLike, name: str) -> NDArray[Any]:
    """As one contiguous array that serialises without a Python number per element.

    Raises:
        ValueError: rows of unequal length, something else than real numbers, a single number, or one that is not finite.
    """
    try:
        array = np.asarray(values)
    except ValueError as exc:
        raise ValueError(f"{name}: rows must be of equal length: {exc}") from exc
    if array.dtype.kind not in "fiub" or not array.ndim:
        raise ValueError(f"{name}: must be rows of numbers, not {array.dtype} {array.shape}")
    with np.errstate(over="ignore"):  # refused below
        array = array.astype(np.float32 if array.dtype.kind == "f" else array.dtype.newbyteorder("="), order="C", copy=False)
    if not np.all(np.isfinite(array)):
        raise ValueError(f"{name}: must be finite: JSON has no NaN; hide what is missing with mask")
    return array
