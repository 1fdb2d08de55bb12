"""The Python client: numpy arrays in, small dataclasses out, synchronous and asynchronous over httpx.

    client = ElbowClient("http://127.0.0.1:8000", model="mnist-iterative")
    reply = client.encode(rows, steps=5)            # rows: (R, 784)
    reply.mu, reply.elbo                            # (R, D), (R,) in nats
    better = client.refine(rows, reply.posteriors, steps=16)

Each call is built and parsed once, by a function below that returns a `Call`; the two clients only differ in how they send it.
From the shell, `python -m service.client encode FILE.npy --model NAME --out OUT.npz` encodes in bulk (service/bulk.py).
"""

from __future__ import annotations

import asyncio
import functools
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import httpx
import numpy as np
import orjson
from numpy.typing import ArrayLike, NDArray

T = TypeVar("T")
P = ParamSpec("P")
Floats = NDArray[np.float32]

TRY_AGAIN = (429, 503)
_MAX_WAIT_S = 30.0


class ElbowHTTPError(Exception):
    """The server refused or failed. `problem` is its problem document, `retry_after_s` when to try again, if it said so."""

    def __init__(self, status: int, problem: Mapping[str, Any], retry_after_s: float | None = None):
        super().__init__(f"{status} {problem.get('code', '')}: {problem.get('detail', 'no detail given')}")
        self.status, self.problem, self.retry_after_s = status, dict(problem), retry_after_s

    @property
    def code(self) -> str:
        return str(self.problem.get("code", ""))


@dataclass(frozen=True, eq=False)
class Level:
    """One level of latent variables: mu, log_sigma (D,), and KL to the prior in nats."""

    mu: Floats
    log_sigma: Floats
    kl: float | None = None


@dataclass(frozen=True, eq=False)
class Posterior:
    """q(z|x) of one row after `step` steps. `carry` is opaque: hand it back."""

    step: int
    levels: tuple[Level, ...]
    carry: str | None = None

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Posterior:
        levels = (Level(_floats(level["mu"]), _floats(level["log_sigma"]), level.get("kl")) for level in raw["levels"])
        return cls(raw["step"], tuple(levels), raw.get("carry"))

    def as_json(self) -> dict[str, Any]:
        levels = [{"mu": level.mu, "log_sigma": level.log_sigma, "kl": level.kl} for level in self.levels]
        return {"step": self.step, "levels": levels} | ({"carry": self.carry} if self.carry is not None else {})


@dataclass(frozen=True, eq=False)
class Row:
    """What a reply says of one row; what was not asked for is None. Nats throughout."""

    steps_used: int | None = None
    stop_reason: str | None = None
    elbo: float | None = None
    log_likelihood: float | None = None
    kl: float | None = None
    posterior: Posterior | None = None
    trace: list[float] | None = None
    mean: Floats | None = None
    samples: Floats | None = None
    z: dict[str, Floats] | None = None
    log_px: float | None = None
    elbo_quantile: float | None = None

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Row:
        drawn = raw.get("reconstruction", raw)
        plain = ("steps_used", "stop_reason", "elbo", "log_likelihood", "kl", "trace", "log_px", "elbo_quantile")
        return cls(
            **{name: raw.get(name) for name in plain},
            posterior=Posterior.parse(raw["posterior"]) if "posterior" in raw else None,
            mean=_floats(drawn["mean"]) if "mean" in drawn else None,
            samples=_floats(drawn["samples"]) if "samples" in drawn else None,
            z={level: _floats(values) for level, values in raw["z"].items()} if "z" in raw else None,
        )


@dataclass(frozen=True, eq=False)
class Reply:
    """One row per input, in order."""

    model: str
    version: str
    rows: list[Row]
    timing: dict[str, float] = field(default_factory=dict)
    precision: str = "float32"
    seed: int | list[int] | None = None

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Reply:
        rows = [Row.parse(row) for row in raw["results"]]
        return cls(raw["model"], raw["version"], rows, raw["timing"], raw.get("precision", "float32"), raw.get("seed"))

    @property
    def posteriors(self) -> list[Posterior]:
        """As `refine`, `reconstruct` and `generate(between=…)` take them."""
        return [row.posterior for row in self.rows if row.posterior is not None]

    @property
    def mu(self) -> Floats:
        """(R, D) posterior means of the first level."""
        return np.stack([posterior.levels[0].mu for posterior in self.posteriors])

    @property
    def log_sigma(self) -> Floats:
        """(R, D) log standard deviations of the first level."""
        return np.stack([posterior.levels[0].log_sigma for posterior in self.posteriors])

    @property
    def elbo(self) -> NDArray[np.float64]:
        """(R,) in nats; NaN where it was not finite or not asked for."""
        return np.asarray([np.nan if row.elbo is None else row.elbo for row in self.rows])

    @property
    def log_px(self) -> NDArray[np.float64]:
        """(R,) importance-weighted log p(x) of `score`, in nats; NaN where it was not asked for."""
        return np.asarray([np.nan if row.log_px is None else row.log_px for row in self.rows])


@dataclass(frozen=True, eq=False)
class Frame:
    """What the server said of one frame of a sequence; what was not asked for is None. Nats. `raw` is the whole result."""

    frame: int
    elbo: float | None
    surprise: float | None
    surprise_quantile: float | None
    steps_used: int
    raw: Mapping[str, Any] = field(repr=False)

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Frame:
        return cls(raw["frame"], raw["elbo"], raw["surprise"], raw["surprise_quantile"], raw["steps_used"], raw)

    @property
    def mu(self) -> Floats:
        """(D,), posterior mean; needs `returns=["posterior"]`."""
        return _floats(self.raw["posterior"]["levels"][0]["mu"])

    @property
    def log_sigma(self) -> Floats:
        """(D,)."""
        return _floats(self.raw["posterior"]["levels"][0]["log_sigma"])


@dataclass(frozen=True, eq=False)
class Filtered:
    """One result per frame, in order, and the `state` from which the next call goes on; `frame` is the index of the next frame."""

    model: str
    version: str
    frames: list[Frame]
    state: str = field(repr=False)
    frame: int = 0
    timing: dict[str, float] = field(default_factory=dict)
    precision: str = "float32"
    seed: int | None = None

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Filtered:
        frames = [Frame.parse(result) for result in raw["results"]]
        rest = (raw["state"], raw["frame"], raw["timing"], raw.get("precision", "float32"), raw.get("seed"))
        return cls(raw["model"], raw["version"], frames, *rest)

    @property
    def elbo(self) -> NDArray[np.float64]:
        """(T,) in nats; NaN where it was not finite."""
        return np.asarray([np.nan if frame.elbo is None else frame.elbo for frame in self.frames])


@dataclass(frozen=True, eq=False)
class Dream:
    """A sequence drawn from a filter's model: frames and the means of their predictions, (T, X); `state` goes on from the last."""

    frames: Floats
    mean: Floats
    state: str
    frame: int = 0

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Dream:
        return cls(_floats(raw["frames"]), _floats(raw["mean"]), raw["state"], raw["frame"])


@dataclass(frozen=True, eq=False)
class StepEvent:
    """Best so far of one row after a step of it."""

    row: int
    step: int
    elbo: float | None
    best_step: int
    best_elbo: float | None
    posterior: Posterior | None = None


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


class _Base:
    """What both clients know: where the server is, who calls, which model is meant, how often to try again."""

    def __init__(self, url: str, model: str | None, version: str | None, retries: int, api_key: str | None, **options: Any):
        self.model, self.version, self.retries = model, version, retries
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
        headers |= options.pop("headers", {})
        self._options: dict[str, Any] = {"base_url": url, "headers": headers, "timeout": 60.0} | options

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

    def wait_s(self, response: httpx.Response, attempt: int) -> float | None:
        """Seconds to wait before trying again, or None if the answer stands."""
        if response.status_code not in TRY_AGAIN or attempt >= self.retries:
            return None
        return min(_retry_after(response) or 2.0**attempt, _MAX_WAIT_S)


def models(client: _Base, /) -> Call[list[dict[str, Any]]]:
    """The models served, newest versions."""
    return Call("GET", "/v1/models", lambda raw: list(raw["models"]))


def card(client: _Base, /, model: str | None = None) -> Call[dict[str, Any]]:
    """The card of a model: what x is, its levels, its trade-off curve."""
    return Call("GET", client.path("", model), dict)


def curve(client: _Base, /, model: str | None = None) -> Call[dict[str, Any]]:
    """ELBO against steps, and milliseconds per batch size on this server."""
    return Call("GET", client.path("/curve", model), dict)


def encode(
    client: _Base,
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
    client: _Base, /, inputs: ArrayLike, posteriors: Sequence[Posterior], *, model: str | None = None, **options: Any
) -> Call[Reply]:
    """Goes on from `posteriors`, one per row; options as of `encode`."""
    body = dict(encode(client, inputs, model=model, **options).body or {})
    body["posterior"] = [posterior.as_json() for posterior in posteriors]
    return Call("POST", client.path("/refine", model), Reply.parse, body)


def reconstruct(
    client: _Base,
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
    client: _Base,
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
    client: _Base,
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
    client: _Base, /, frames: int, *, count: int = 1, seed: int | None = None, state: str | None = None, model: str | None = None
) -> Call[list[Dream]]:
    """`count` sequences of so many frames drawn from a filter's model: from the beginning, or on from a state (`generate` of a filter).
    Without a `seed` a sequence goes on with the noise of the state's."""
    body = {"frames": frames, "count": count, "seed": seed, "state": state}
    return Call("POST", client.path("/generate", model), lambda raw: [Dream.parse(result) for result in raw["results"]], body)


def filter(
    client: _Base,
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


def _followed(client: _Base, inputs: ArrayLike, posteriors: Sequence[Posterior] | None, options: Mapping[str, Any]) -> Call[Reply]:
    """The call whose events are told."""
    return encode(client, inputs, **options) if posteriors is None else refine(client, inputs, posteriors, **options)


def _sync(build: Callable[Concatenate[_Base, P], Call[T]]) -> Callable[Concatenate[ElbowClient, P], T]:
    @functools.wraps(build)
    def method(self: ElbowClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.send(build(self, *args, **kwargs))

    return method


def _async(build: Callable[Concatenate[_Base, P], Call[T]]) -> Callable[Concatenate[AsyncElbowClient, P], Coroutine[Any, Any, T]]:
    @functools.wraps(build)
    async def method(self: AsyncElbowClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.send(build(self, *args, **kwargs))

    return method


class ElbowClient(_Base):
    """Synchronous client; a context manager. Replies of 429 and 503 are tried again `retries` times, as the server asks.

    `api_key` is sent as a bearer token; `options` are httpx.Client's. `version` is one of `model`, or of whichever model a call names if
    the client has none.

    Raises (every call): ElbowHTTPError with the server's problem document; httpx.TransportError if it cannot be reached; ValueError for
    arrays that are no rows of finite numbers, no model, or another model than the one to which the client's version belongs.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        model: str | None = None,
        version: str | None = None,
        retries: int = 3,
        api_key: str | None = None,
        **options: Any,
    ):
        super().__init__(url, model, version, retries, api_key, **options)
        self._http = httpx.Client(**self._options)

    models, card, curve = _sync(models), _sync(card), _sync(curve)
    encode, refine, reconstruct, score, generate = _sync(encode), _sync(refine), _sync(reconstruct), _sync(score), _sync(generate)
    dream, filter = _sync(dream), _sync(filter)

    def send(self, call: Call[T]) -> T:
        attempt = 0
        while True:
            response = self._http.request(call.method, call.path, content=call.content)
            wait = self.wait_s(response, attempt)
            if wait is None:
                return call.parse(_checked(response))
            time.sleep(wait)
            attempt += 1

    def events(self, inputs: ArrayLike, posteriors: Sequence[Posterior] | None = None, **options: Any) -> Iterator[StepEvent | Reply]:
        """Encodes, or refines `posteriors`, telling the best so far after every step; ends with the Reply. Options as of `encode`."""
        call = _followed(self, inputs, posteriors, options)
        attempt = 0
        while True:
            with self._http.stream(call.method, call.path, content=call.content, headers=_EVENTS) as response:
                wait = self.wait_s(response, attempt)
                if wait is None:
                    if response.status_code != httpx.codes.OK:
                        response.read()
                        _checked(response)
                    reader = _EventReader()
                    for line in response.iter_lines():
                        if (event := reader.feed(line)) is not None:
                            yield event
                    return
            time.sleep(wait)
            attempt += 1

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> ElbowClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class AsyncElbowClient(_Base):
    """As ElbowClient, with awaitable calls; an asynchronous context manager."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        model: str | None = None,
        version: str | None = None,
        retries: int = 3,
        api_key: str | None = None,
        **options: Any,
    ):
        super().__init__(url, model, version, retries, api_key, **options)
        self._http = httpx.AsyncClient(**self._options)

    models, card, curve = _async(models), _async(card), _async(curve)
    encode, refine, reconstruct, score, generate = _async(encode), _async(refine), _async(reconstruct), _async(score), _async(generate)
    dream, filter = _async(dream), _async(filter)

    async def send(self, call: Call[T]) -> T:
        attempt = 0
        while True:
            response = await self._http.request(call.method, call.path, content=call.content)
            wait = self.wait_s(response, attempt)
            if wait is None:
                return call.parse(_checked(response))
            await asyncio.sleep(wait)
            attempt += 1

    async def events(
        self, inputs: ArrayLike, posteriors: Sequence[Posterior] | None = None, **options: Any
    ) -> AsyncIterator[StepEvent | Reply]:
        """As `ElbowClient.events`."""
        call = _followed(self, inputs, posteriors, options)
        attempt = 0
        while True:
            async with self._http.stream(call.method, call.path, content=call.content, headers=_EVENTS) as response:
                wait = self.wait_s(response, attempt)
                if wait is None:
                    if response.status_code != httpx.codes.OK:
                        await response.aread()
                        _checked(response)
                    reader = _EventReader()
                    async for line in response.aiter_lines():
                        if (event := reader.feed(line)) is not None:
                            yield event
                    return
            await asyncio.sleep(wait)
            attempt += 1

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> AsyncElbowClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()


_EVENTS = {"Accept": "text/event-stream"}


class _EventReader:
    """Lines of a text/event-stream to events."""

    def __init__(self) -> None:
        self._kind, self._data = "", b""

    def feed(self, line: str) -> StepEvent | Reply | None:
        """The event that this line completes, if it does.

        Raises:
            ElbowHTTPError: the server failed after the stream had begun.
        """
        name, _, value = line.partition(": ")
        if name == "event":
            self._kind = value
        elif name == "data":
            self._data = value.encode()
        elif not line and self._data:
            raw, self._data = orjson.loads(self._data), b""
            if self._kind == "error":
                raise ElbowHTTPError(raw["status"], raw, raw.get("retry_after_s"))
            if self._kind == "done":
                return Reply.parse(raw)
            posterior = Posterior.parse(raw.pop("posterior")) if "posterior" in raw else None
            return StepEvent(**raw, posterior=posterior)
        return None


def _checked(response: httpx.Response) -> Any:
    """The reply's JSON.

    Raises:
        ElbowHTTPError: any other status than 200.
    """
    if response.status_code == httpx.codes.OK:
        return orjson.loads(response.content)
    try:
        problem = orjson.loads(response.content)
    except orjson.JSONDecodeError:
        problem = {"detail": response.text[:200]}
    raise ElbowHTTPError(response.status_code, problem if isinstance(problem, dict) else {}, _retry_after(response))


def _retry_after(response: httpx.Response) -> float | None:
    value = response.headers.get("retry-after", "")
    return float(value) if value.isdigit() else None


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


def _floats(values: Any) -> Floats:
    return np.asarray(values, np.float32)


if __name__ == "__main__":
    from service.bulk import main

    sys.exit(main())
