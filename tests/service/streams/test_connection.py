"""One connection keeps within bounds whatever its client sends, and however slowly it reads; silence and failures are told once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from starlette.websockets import WebSocket

from service.deps import Server
from service.errors import BackendFailure
from service.jobs import Limits
from service.keys import Caller, Quota
from service.repository import Repository
from service.scheduler.scheduler import Scheduler
from service.streams.connection import MOST_WAITING, Connection
from service.streams.frame_noise import NOISE_AT_ONCE, NOISE_FRAMES, FrameNoise
from service.streams.stream import Portion
from service.telemetry import Call, Metrics
from tests.service.streams.small_filter import SmallFilter, X
from tests.service.streams.test_faults import Waiter

ALL_PARTS = "posterior,reconstruction,prediction"


class Client:
    """A client of the one model of a server, whose scheduler runs unless `holds`: then portions are answered by hand."""

    def __init__(self, *, idle_s: float = 60.0, parts: str = "", query: str = "", holds: bool = False, quota: Quota | None = None):
        self.scheduler = Scheduler(streams=8)
        repository = Repository(self.scheduler, lambda artifact: pytest.fail("nothing to build"))
        model = repository.add(SmallFilter(), "0" * 64)  # type: ignore[arg-type]
        limits = Limits(2**20, 1000, 16, 16, 1e4, stream_idle_s=idle_s, drain_s=2.0)
        self.server = Server(self.scheduler, repository, limits, Metrics())
        self.said: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.heard: list[dict[str, Any]] = []
        self.reads = asyncio.Event()
        self.reads.set()
        self.code: int | None = None
        self.fed: list[int] = []
        self.held: list[Portion] = []
        self.query = f"encoding=json&seed=1&return={parts}{query}"
        if not holds:
            self.scheduler.start()
        lane = self.scheduler.stream_lane(model.key)
        feed = lane.feed

        def noted(portion: Portion) -> None:
            self.fed.append(len(portion.x))
            if holds:
                portion.stream.feed(portion)
                self.held.append(portion)
            else:
                feed(portion)

        lane.feed = noted  # type: ignore[method-assign]
        self.said.put_nowait({"type": "websocket.connect"})
        scope = {
            "type": "websocket",
            "query_string": self.query.encode(),
            "headers": [],
            "path_params": {},
            "caller": Caller("bob", quota),
            "call": Call("request-1"),
        }
        self.connection = Connection(WebSocket(scope, self.said.get, self._send), self.server, model, lane, "")

    async def _send(self, message: Any) -> None:
        await self.reads.wait()
        if message["type"] == "websocket.send":
            self.heard.append(json.loads(message["text"]))
        elif message["type"] == "websocket.close":
            self.code = message["code"]

    def say(self, kind: str, **keys: Any) -> None:
        self.said.put_nowait({"type": "websocket.receive", "text": json.dumps({"type": kind, **keys})})

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [message for message in self.heard if message["type"] == kind]

    async def until(self, kind: str) -> None:
        async with asyncio.timeout(10):
            while not self.of(kind):
                await asyncio.sleep(0.005)

    def refusals(self) -> dict[str, float]:
        (family,) = (one for one in self.server.metrics.registry.collect() if one.name == "elbow_refusals")
        return {sample.labels["reason"]: sample.value for sample in family.samples if sample.name.endswith("_total")}


def talk(scenario: Callable[[Client], Awaitable[None]], **options: Any) -> Client:
    async def run() -> Client:
        client = Client(**options)
        await client.connection._socket.accept()
        serving = asyncio.create_task(client.connection.serve())
        try:
            async with asyncio.timeout(20):
                await scenario(client)
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            await client.scheduler.stop(0.5)
        return client

    return asyncio.run(run())


def test_a_long_gap_is_worked_off_in_pieces() -> None:
    """40 bytes made an array of 80 MB, one reply of 100,000 results and one draw of all their noise."""

    async def scenario(client: Client) -> None:
        client.say("gap", frames=3000)
        client.say("marker", id="after")
        await client.until("marker")

    client = talk(scenario, query="&token_every=7")
    assert max(client.fed) <= MOST_WAITING
    assert [m["type"] for m in client.heard[-2:]] == ["state", "marker"]
    assert client.of("state")[0]["frame"] == 3000
    assert len(client.of("state")) == 1  # from the middle of a gap a client could not go on
    frames = [result["frame"] for message in client.of("results") for result in message["results"]]
    assert frames == list(range(3000))
    assert max(len(message["results"]) for message in client.of("results")) <= MOST_WAITING


def test_a_gap_takes_no_memory_and_waits_no_longer_than_its_turn() -> None:
    async def scenario(client: Client) -> None:
        client.say("gap", frames=100_000)
        await asyncio.sleep(0.05)
        assert MOST_WAITING < sum(client.fed) <= 2 * MOST_WAITING
        assert all(portion.x.strides == (0, 0) for portion in client.held)

    talk(scenario, holds=True)


def test_a_stream_that_drains_in_a_gap_gives_its_token_after_it() -> None:
    async def scenario(client: Client) -> None:
        client.say("gap", frames=2000)
        while not client.fed:
            await asyncio.sleep(0)
        await client.connection.drain()
        assert client.of("draining")[0]["frame"] == 2000
        assert client.code == 1012

    talk(scenario)


def test_the_noise_of_a_long_portion_is_drawn_a_few_frames_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, drawn = SmallFilter(), []
    scheduler = Scheduler(streams=8)
    scheduler.add_model("f", engine)
    keys = FrameNoise._keys

    def noted(self: FrameNoise, seeds: Any, frames: Any, uses: Any) -> Any:
        drawn.append(len(frames))
        return keys(self, seeds, frames, uses)

    monkeypatch.setattr(FrameNoise, "_keys", noted)
    waiters = [Waiter(scheduler) for _ in range(2)]
    for waiter, frames in zip(waiters, (300, 70), strict=True):
        waiter.feed(frames)
    given: list[Any] = []
    plain = engine.run_rows

    def seen(program: str, slots: Any, noise: Any, guard: Any = None) -> Any:
        given.append(noise["noise_advance"][0])
        return plain(program, slots, noise, guard)

    monkeypatch.setattr(engine, "run_rows", seen)
    scheduler.drain()
    assert max(drawn) == 2 * NOISE_FRAMES <= NOISE_AT_ONCE
    one = FrameNoise(engine.card).advance(np.full(300, 1, np.uint64), np.arange(300))["noise_advance"]
    np.testing.assert_array_equal(np.stack(given[-230:]), one[70:])


def test_a_client_that_reads_slowly_is_read_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was answered and not sent counted for nothing: kilobytes were held for every frame of some bytes."""
    frames = [[0.123456] * X] * 100
    monkeypatch.setattr("service.streams.connection.MOST_UNSENT", 2**16)

    async def scenario(client: Client) -> None:
        await client.until("opened")
        client.reads.clear()
        for _ in range(25):
            client.say("frames", frames=frames)
        while client.connection._room.is_set() or client.connection._waiting:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert client.said.qsize() > 5
        assert 2**16 < client.connection._unsent < 2**16 + 12 * 2**15  # what was on its way when reading stopped is answered yet
        client.reads.set()
        client.say("marker", id=1)
        await client.until("marker")
        assert sum(len(message["results"]) for message in client.of("results")) == 2500
        assert client.connection._unsent == 0

    talk(scenario, parts=ALL_PARTS)


def test_markers_without_end_are_not_taken_without_end() -> None:
    async def scenario(client: Client) -> None:
        for number in range(3 * MOST_WAITING):
            client.say("marker", id=number)
        await asyncio.sleep(0.1)
        assert len(client.held) <= MOST_WAITING + 1

    talk(scenario, holds=True)


def test_a_stream_that_waits_for_the_server_is_not_idle_and_a_silent_one_is_told_once() -> None:
    async def scenario(client: Client) -> None:
        client.say("frames", frames=[[0.0] * X] * 2)
        await asyncio.sleep(0.4)
        assert client.code is None
        (portion,) = client.held
        portion.elbo, portion.kl, portion.log_likelihood, portion.steps_used = [-1.0] * 2, [0.0] * 2, [-1.0] * 2, [0] * 2
        portion.settle()
        await client.until("error")
        await asyncio.sleep(0.05)
        assert client.code == 1008

    client = talk(scenario, holds=True, idle_s=0.1)
    assert len(client.of("error")) == 1
    assert client.refusals() == {"idle": 1.0}


def test_a_client_that_takes_nothing_is_let_go() -> None:
    async def scenario(client: Client) -> None:
        await client.until("opened")
        client.reads.clear()
        client.say("frames", frames=[[0.0] * X] * 2)
        await asyncio.sleep(0.5)
        assert client.refusals() == {"idle": 1.0}

    talk(scenario, idle_s=0.1)


def test_a_stream_that_fails_is_one_failure_and_what_it_did_not_get_is_not_paid_for() -> None:
    quota = Quota(0.001, 10_000)

    async def scenario(client: Client) -> None:
        for _ in range(3):
            client.say("frames", frames=[[0.0] * X] * 2)
        client.say("gap", frames=5000)
        await asyncio.sleep(0.1)
        assert quota._left == pytest.approx(4994, abs=1)
        for portion in client.held:
            portion.error = BackendFailure("it broke")
            portion.settle()
        await client.until("error")

    client = talk(scenario, holds=True, quota=quota)
    assert client.refusals() == {"backend_failure": 1.0}
    assert client.code == 1011
    assert quota._left == pytest.approx(10_000, abs=1)


def test_a_spent_quota_says_when_to_come_back() -> None:
    async def scenario(client: Client) -> None:
        for _ in range(2):
            client.say("frames", frames=[[0.0] * X] * 5)
        await client.until("error")

    client = talk(scenario, quota=Quota(0.1, 1))
    (error,) = client.of("error")
    assert (error["code"], client.code) == ("quota_exceeded", 1013)
    assert 10 < error["retry_after_s"] < 110


def test_an_answer_that_cannot_be_made_ends_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(client: Client) -> None:
        monkeypatch.setattr(client.connection._shaper, "results", lambda *_: 1 / 0)
        client.say("frames", frames=[[0.0] * X])
        await client.until("error")

    assert talk(scenario).refusals() == {"backend_failure": 1.0}
