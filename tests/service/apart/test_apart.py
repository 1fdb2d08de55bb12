"""The engine process behind the same interface: the same answers, the same refusals, and nobody left waiting whatever ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from models.artifact import ArtifactError
from service.apart.remote import RemoteScheduler
from service.app import create_app
from service.errors import BackendFailure, Overloaded, ShuttingDown, UnknownModel
from service.jobs import Limits, encode_job
from service.schemas import EncodeBody
from service.settings import Settings
from service.streams.stream import Portion, Stream, StreamSpec
from tests.service.streams.conftest import free_port

CHECKPOINTS = Path(__file__).parents[3] / "checkpoints"
LIMITS = Limits(max_body_bytes=2**20, max_rows=2000, max_samples=256, max_importance_samples=500, max_deadline_ms=1e6)
ROWS = np.random.default_rng(0).standard_normal((5, 8)).round(3).tolist()


class Running:
    """An application in a loop of its own, and a client for it."""

    def __init__(self, runner: asyncio.Runner, app: Any):
        self.app, self._runner = app, runner
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=60)

    @property
    def server(self) -> Any:
        return self.app.state.server

    @property
    def scheduler(self) -> RemoteScheduler:
        scheduler: RemoteScheduler = self.server.scheduler
        return scheduler

    def run(self, awaitable: Any) -> Any:
        async def waited() -> Any:
            return await awaitable

        return self._runner.run(waited())

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.run(self.http.post(f"/v1/models/{path}", json=body))

    def wait_for(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        async def wait() -> None:
            async with asyncio.timeout(seconds):
                while not condition():
                    await asyncio.sleep(0.01)

        self._runner.run(wait())


Start = Callable[..., Running]


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """start(**settings): an application that runs until the module's tests are over."""
    closing: list[tuple[asyncio.Runner, Any]] = []

    def start(**settings: Any) -> Running:
        runner = asyncio.Runner()
        app = create_app(Settings(**{"engine_process": "on", "threads": 1, "drain_s": 1.0, "token_secret": "secret", **settings}))
        lifespan = app.router.lifespan_context(app)
        running = Running(runner, app)
        running.run(lifespan.__aenter__())
        closing.append((runner, lifespan))
        return running

    yield start
    for runner, lifespan in closing:
        runner.run(lifespan.__aexit__(None, None, None))
        runner.close()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("apart")
    for name in ("mnist-iterative", "jsb-filter"):
        (folder / name).symlink_to(CHECKPOINTS / name)
    return folder


@pytest.fixture(scope="module")
def apart(start: Start, repository: Path) -> Running:
    return start(repository=repository, closed_form=True, engine="onnx")


@pytest.fixture(scope="module")
def within(start: Start, repository: Path) -> Running:
    return start(repository=repository, closed_form=True, engine="onnx", engine_process="off")


@pytest.fixture
def alone(start: Start, tmp_path: Path) -> Running:
    """One that a test may break."""
    return start(repository=tmp_path, closed_form=True)


def digits(rows: int) -> list[list[int]]:
    return (np.random.default_rng(1).random((rows, 784)) < 0.2).astype(int).tolist()


FRAMES = (np.random.default_rng(2).random((7, 88)) < 0.05).astype(int).tolist()


def without_state(result: dict[str, Any]) -> dict[str, Any]:
    """A token holds when it expires."""
    return {name: value for name, value in result.items() if name != "state"}


CALLS: dict[str, dict[str, Any]] = {
    "mnist-iterative/encode": {"inputs": digits(3), "steps": 4, "seed": [3, 4, 5], "return": ["posterior", "elbo", "trace", "z", "carry"]},
    "mnist-iterative/score": {"inputs": digits(2), "samples": 50, "seed": 1},
    "mnist-iterative/reconstruct": {"inputs": digits(2), "mask": [[1] * 400 + [0] * 384] * 2, "samples": 2, "seed": 1},
    "mnist-iterative/generate": {"count": 3, "samples": 1, "seed": 2},
    "closed-form/encode": {"inputs": ROWS, "tolerance": 0.01},
    "jsb-filter/filter": {"frames": FRAMES, "seed": 9, "steps": 2, "return": ["posterior", "prediction", "reconstruction", "kl"]},
    "jsb-filter/generate": {"count": 2, "frames": 3, "seed": 4},
}


@pytest.mark.parametrize("call", CALLS)
def test_the_answers_are_those_of_one_process(apart: Running, within: Running, call: str) -> None:
    replies = [running.post(call, **CALLS[call]) for running in (apart, within)]
    assert [reply.status_code for reply in replies] == [200, 200]
    first, second = ([without_state(entry) for entry in reply.json()["results"]] for reply in replies)
    assert first
    assert first == second


def test_events_come_one_by_one_and_end_with_the_reply(apart: Running) -> None:
    body = {"inputs": digits(1), "steps": 3, "seed": 7}
    told = apart.run(apart.http.post("/v1/models/mnist-iterative/encode", json=body, headers={"Accept": "text/event-stream"})).text
    assert [line for line in told.splitlines() if line.startswith("event:")] == ["event: step"] * 4 + ["event: done"]


def test_a_sequence_goes_on_from_its_token(apart: Running) -> None:
    whole = apart.post("jsb-filter/filter", frames=FRAMES, seed=9).json()["results"]
    first = apart.post("jsb-filter/filter", frames=FRAMES[:3], seed=9).json()
    rest = apart.post("jsb-filter/filter", frames=FRAMES[3:], state=first["state"]).json()
    assert first["results"] + rest["results"] == whole


def test_what_is_refused_is_refused_in_the_same_words(apart: Running, within: Running) -> None:
    for call, body in {
        "mnist-iterative/encode": {"inputs": digits(1), "steps": 64, "deadline_ms": 0.001, "elastic": False},
        "mnist-iterative/filter": {"frames": FRAMES},
        "jsb-filter/encode": {"inputs": FRAMES},
    }.items():
        replies = [running.post(call, **body) for running in (apart, within)]
        assert replies[0].status_code == replies[1].status_code >= 400
        assert replies[0].json()["code"] == replies[1].json()["code"]


def test_what_is_done_is_counted(apart: Running) -> None:
    def done() -> int:
        return sum(counts.jobs_done for counts in apart.scheduler.stats().values())

    before = done()
    apart.post("closed-form/encode", inputs=ROWS)
    assert done() == before + 1  # told with the answer itself
    frames = apart.scheduler.stream_stats()["jsb-filter/1"][1].frames
    apart.post("jsb-filter/filter", frames=FRAMES)
    assert apart.scheduler.stream_stats()["jsb-filter/1"][1].frames == frames + len(FRAMES)
    apart.wait_for(lambda: apart.scheduler.stream_stats()["jsb-filter/1"][0] == 0)
    text = apart.run(apart.http.get("/metrics")).text
    assert "elbow_engine_process_resident_memory_bytes" in text


def job_of(running: Running, rows: int, steps: int) -> Any:
    body = EncodeBody.model_validate({"inputs": [[0.5] * 8] * rows, "steps": steps, "samples": 256, "return": ["trace"]})
    return encode_job(body, running.server.repository.get("closed-form"), LIMITS, time.monotonic())


def test_who_leaves_frees_its_rows_and_is_not_answered(alone: Running) -> None:
    async def leave() -> None:
        asking = asyncio.create_task(alone.scheduler.submit(job_of(alone, 2000, 128)))
        async with asyncio.timeout(10):  # it is told while the work goes on
            while alone.scheduler.stats()["closed-form/1"].rows_in_flight == 0:
                await asyncio.sleep(0.01)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    alone.run(leave())
    alone.wait_for(lambda: alone.scheduler.stats()["closed-form/1"].rows_in_flight == 0)
    counts = alone.scheduler.stats()["closed-form/1"]
    assert (counts.jobs_abandoned, counts.jobs_done) == (1, 0)


def test_a_stream_that_is_closed_leaves_nothing_behind(apart: Running) -> None:
    lane, settled = apart.scheduler.stream_lane("jsb-filter/1"), []

    async def come_and_go() -> None:
        stream = Stream(StreamSpec(steps=16, seed=1), settled.append, asyncio.get_running_loop())
        lane.open(stream)
        for _ in range(3):
            lane.feed(Portion(stream, np.zeros((3000, 88), np.float32), None, time.monotonic()))
        await asyncio.sleep(0.05)
        lane.close(stream)
        lane.close(stream)
        assert lane.live == 1  # until its slot is free
        lane.feed(Portion(stream, np.zeros((1, 88), np.float32), None, time.monotonic()))

    apart.run(come_and_go())
    apart.wait_for(lambda: lane.live == 0)
    assert not settled
    assert (apart.scheduler._portions, apart.scheduler._streams) == ({}, {})


def test_a_full_line_is_known_at_the_door(start: Start, tmp_path: Path) -> None:
    running = start(repository=tmp_path, closed_form=True, queue_rows=8, max_wait_s=0.05)

    async def fill() -> list[Any]:
        jobs = [asyncio.create_task(running.scheduler.submit(job_of(running, 20, 16))) for _ in range(20)]
        async with asyncio.timeout(10):
            while True:  # refused at the door, before any body would be read
                try:
                    running.scheduler.check_door("closed-form/1")
                except Overloaded:
                    break
                await asyncio.sleep(0.001)
        return await asyncio.gather(*jobs, return_exceptions=True)

    outcomes = running.run(fill())
    refused = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    assert 0 < len(refused) < 20
    assert all(isinstance(outcome, Overloaded) and outcome.retry_after_s > 0 for outcome in refused)
    running.scheduler.check_door("closed-form/1")  # it is open again


def test_models_come_and_go(start: Start, tmp_path: Path) -> None:
    running = start(repository=tmp_path, closed_form=True)
    (tmp_path / "jsb-filter").symlink_to(CHECKPOINTS / "jsb-filter")
    repository = running.server.repository
    running.run(asyncio.to_thread(repository.refresh))
    assert running.post("jsb-filter/filter", frames=FRAMES).status_code == 200
    running.run(asyncio.to_thread(repository.unload, "jsb-filter"))
    repository._closing = dict.fromkeys(repository._closing, 0.0)
    running.run(asyncio.to_thread(repository.tend))
    with pytest.raises(UnknownModel):
        running.scheduler.stream_lane("jsb-filter/1")


def test_what_an_engine_refuses_is_said_here(apart: Running, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nothing here"):
        apart.run(asyncio.to_thread(apart.scheduler.build, SimpleNamespace(path=tmp_path / "nothing here")))


def test_when_the_engine_process_ends_everybody_is_answered(alone: Running) -> None:
    async def lose() -> list[Any]:
        jobs = [asyncio.create_task(alone.scheduler.submit(job_of(alone, 2000, 128))) for _ in range(3)]
        calls = [asyncio.create_task(alone.scheduler.call("stop", 60.0))]
        await asyncio.sleep(0.2)
        os.kill(alone.scheduler.process.pid, signal.SIGKILL)
        return await asyncio.gather(*jobs, *calls, return_exceptions=True)

    outcomes = alone.run(lose())
    assert [type(outcome) for outcome in outcomes] == [BackendFailure] * 4
    assert not alone.scheduler.alive
    assert alone.run(alone.http.get("/livez")).status_code == 503
    assert alone.post("closed-form/encode", inputs=ROWS).json()["code"] == "backend_failure"


def test_whoever_waits_when_the_server_stops_is_told(start: Start, tmp_path: Path) -> None:
    running = start(repository=tmp_path, closed_form=True)

    async def stop() -> Any:
        asking = asyncio.create_task(running.scheduler.submit(job_of(running, 2000, 128)))
        await asyncio.sleep(0.2)
        await running.scheduler.stop(0.1)
        return await asyncio.gather(asking, return_exceptions=True)

    (outcome,) = running.run(stop())
    assert isinstance(outcome, ShuttingDown)
    assert running.scheduler.process.poll() == 0


SERVER = """
import asyncio, sys
from service.apart.remote import RemoteScheduler
from service.settings import Settings
from service.streams.stream import Portion, Stream, StreamSpec
from tests.service.streams.conftest import free_port
async def main():
    scheduler = await RemoteScheduler.start(Settings(engine_process="on"))
    print(scheduler.process.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_engine_process_does_not_outlive_its_server(how: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        engine = int(server.stdout.readline())
        server.send_signal(how)
    until = time.monotonic() + 10
    while Path(f"/proc/{engine}/cmdline").exists() and Path(f"/proc/{engine}/cmdline").read_bytes():
        assert time.monotonic() < until, "the engine process lives on"
        time.sleep(0.05)


def test_a_server_whose_engine_process_was_killed_leaves_with_an_error(tmp_path: Path) -> None:
    """Whoever watches it (an orchestrator, a container's restart policy) starts a fresh one."""
    port = free_port()
    environment = os.environ | {"ELBOW_PORT": str(port), "ELBOW_REPOSITORY": str(tmp_path), "ELBOW_CLOSED_FORM": "true"}
    command = [sys.executable, "-m", "service", "run", "--engine-process", "on"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as server:
        until, pid = time.monotonic() + 30, ""
        while not pid:
            assert time.monotonic() < until, "the server is not ready"
            with suppress(httpx.TransportError):
                assert httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
                (pid,) = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
            time.sleep(0.05)
        os.kill(int(pid), signal.SIGKILL)
        assert server.wait(15) == 1
        assert server.stderr is not None
        assert "the engine process has ended" in server.stderr.read()


def test_a_stream_without_a_frame_yet_keeps_the_version_it_began_with(start: Start, repository: Path) -> None:
    running, settled = start(repository=repository, engine="onnx"), []
    lane = running.scheduler.stream_lane("jsb-filter/1")

    async def go_on() -> None:
        stream = Stream(StreamSpec(steps=1, seed=1), settled.append, asyncio.get_running_loop())
        lane.open(stream)
        await asyncio.to_thread(running.scheduler.remove_model, "jsb-filter/1")
        await asyncio.sleep(0.2)  # it would have been closed by now
        lane.feed(Portion(stream, np.zeros((2, 88), np.float32), None, time.monotonic()))
        late = Stream(StreamSpec(steps=1, seed=1), settled.append, asyncio.get_running_loop())
        with pytest.raises(UnknownModel):
            lane.open(late)

    running.run(go_on())
    running.wait_for(lambda: bool(settled))
    assert (settled[0].error, settled[0].done) == (None, 2)


def test_a_stream_whose_model_went_while_it_was_opened_is_answered(start: Start, repository: Path) -> None:
    running, settled = start(repository=repository, engine="onnx"), []
    lane = running.scheduler.stream_lane("jsb-filter/1")

    async def go_on() -> None:
        await running.scheduler.call("remove", "jsb-filter/1")  # as the engine process knows, and nobody else yet
        stream = Stream(StreamSpec(steps=1, seed=1), settled.append, asyncio.get_running_loop())
        lane.open(stream)
        lane.feed(Portion(stream, np.zeros((2, 88), np.float32), None, time.monotonic()))
        while not settled:
            await asyncio.sleep(0.01)
        lane.close(stream)

    running.run(go_on())
    assert isinstance(settled[0].error, UnknownModel)
    running.wait_for(lambda: lane.live == 0)


def test_a_hung_engine_process_does_not_keep_the_server(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = start(repository=tmp_path, closed_form=True)
    monkeypatch.setattr("service.apart.remote.END_S", 0.3)

    async def stop() -> Any:
        os.kill(running.scheduler.process.pid, signal.SIGSTOP)
        asking = asyncio.create_task(running.scheduler.submit(job_of(running, 1, 1)))
        await asyncio.sleep(0)
        began = time.monotonic()
        await running.scheduler.stop(0.1)
        return time.monotonic() - began, await asyncio.gather(asking, return_exceptions=True)

    took, (outcome,) = running.run(stop())
    assert took < 5
    assert isinstance(outcome, BackendFailure)


def test_what_lies_in_the_working_folder_is_not_imported(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    assert start(repository=tmp_path, closed_form=True).post("closed-form/encode", inputs=ROWS).status_code == 200
