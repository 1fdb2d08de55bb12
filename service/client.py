"""The Python client: numpy arrays in, small dataclasses out, synchronous and asynchronous over httpx.

    client = ElbowClient("http://127.0.0.1:8000", model="mnist-iterative")
    reply = client.encode(rows, steps=5)            # rows: (R, 784)
    reply.mu, reply.elbo                            # (R, D), (R,) in nats
    better = client.refine(rows, reply.posteriors, steps=16)

Each call is built and parsed once, by a function of service/client_calls.py that returns a `Call`; the two clients only differ in how
they send it. What they return is in service/client_replies.py.
From the shell, `python -m service.client encode FILE.npy --model NAME --out OUT.npz` encodes in bulk (service/bulk.py).
"""

from __future__ import annotations

import asyncio
import functools
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import httpx
import orjson
from numpy.typing import ArrayLike

from service import client_calls as calls
from service.client_calls import Call, Target
from service.client_replies import Dream, Filtered, Frame, Level, Posterior, Reply, Row, StepEvent

__all__ = [
    "AsyncElbowClient",
    "Dream",
    "ElbowClient",
    "ElbowHTTPError",
    "Filtered",
    "Frame",
    "Level",
    "Posterior",
    "Reply",
    "Row",
    "StepEvent",
]

T = TypeVar("T")
P = ParamSpec("P")

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


class _Base(Target):
    """What both clients know beside the model: where the server is, who calls, how often to try again."""

    def __init__(self, url: str, model: str | None, version: str | None, retries: int, api_key: str | None, **options: Any):
        super().__init__(model, version)
        self.retries = retries
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
        headers |= options.pop("headers", {})
        self._options: dict[str, Any] = {"base_url": url, "headers": headers, "timeout": 60.0} | options

    def wait_s(self, response: httpx.Response, attempt: int) -> float | None:
        """Seconds to wait before trying again, or None if the answer stands."""
        if response.status_code not in TRY_AGAIN or attempt >= self.retries:
            return None
        return min(_retry_after(response) or 2.0**attempt, _MAX_WAIT_S)


def _sync(build: Callable[Concatenate[Target, P], Call[T]]) -> Callable[Concatenate[ElbowClient, P], T]:
    @functools.wraps(build)
    def method(self: ElbowClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.send(build(self, *args, **kwargs))

    return method


def _async(build: Callable[Concatenate[Target, P], Call[T]]) -> Callable[Concatenate[AsyncElbowClient, P], Coroutine[Any, Any, T]]:
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

    models, card, curve = _sync(calls.models), _sync(calls.card), _sync(calls.curve)
    encode, refine, reconstruct = _sync(calls.encode), _sync(calls.refine), _sync(calls.reconstruct)
    score, generate = _sync(calls.score), _sync(calls.generate)
    dream, filter = _sync(calls.dream), _sync(calls.filter)

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
        call = calls.followed(self, inputs, posteriors, options)
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

    models, card, curve = _async(calls.models), _async(calls.card), _async(calls.curve)
    encode, refine, reconstruct = _async(calls.encode), _async(calls.refine), _async(calls.reconstruct)
    score, generate = _async(calls.score), _async(calls.generate)
    dream, filter = _async(calls.dream), _async(calls.filter)

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
        call = calls.followed(self, inputs, posteriors, options)
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


if __name__ == "__main__":
    from service.bulk import main

    sys.exit(main())
