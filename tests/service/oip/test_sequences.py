"""Live sequences: whose they are, how many, how long they live, and that everyone who waits is answered."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import httpx
import numpy as np
import pytest

from service.errors import BackendFailure, InvalidInput, Overloaded, ShuttingDown
from service.oip.sequences import SequenceControl, SequenceId, Sequences, read_control
from service.schemas import FilterBody
from service.streams.stateless import Frames

SETTINGS = {"steps": 1, "seed": 3, "elastic": False, "return": ["elbo", "surprise"]}
FRAMES = Frames(SETTINGS, None, np.zeros((2, 4), np.float32), None)


@dataclass
class ManualLane:
    """A lane that answers when told to."""

    draining: bool = False
    fed: list = field(default_factory=list)
    open_streams: set = field(default_factory=set)

    def open(self, stream):
        self.open_streams.add(stream)

    def feed(self, portion):
        portion.stream.feed(portion)
        self.fed.append(portion)

    def close(self, stream):
        self.open_streams.discard(stream)

    def answer(self, error=None):
        portion = self.fed.pop(0)
        portion.error, portion.state = error, {"h": np.zeros(2)}
        portion.first_frame, portion.elbo = portion.stream.frame, [-1.0] * len(portion.x)
        portion.stream.frame += len(portion.x)
        portion.settle()


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def world():
    clock = Clock()
    return Sequences(2, 60.0, clock), ManualLane(), clock


def name(identity=1, key="", version=None):
    return SequenceId(key, "filter", version, identity)


def body(**fields):
    return FilterBody.model_validate({"frames": [], **fields})


async def answered(lane, *waiting):
    tasks = [asyncio.ensure_future(one) for one in waiting]
    await asyncio.sleep(0)
    while lane.fed:
        lane.answer()
    return [await task for task in tasks]


def test_requests_in_line_are_answered_in_order_and_add_up(world):
    sequences, lane, _ = world

    async def scenario():
        sequence = sequences.start(name(), None, lane, FRAMES)
        pieces = await answered(lane, *(sequences.filter(sequence, FRAMES, last=i == 2) for i in range(3)))
        assert [portion.first_frame for portion, _ in pieces] == [0, 2, 4]
        assert [after.frame for _, after in pieces] == [2, 4, 6]
        assert pieces[-1][1].summary["nats"] == -6.0
        assert not lane.open_streams
        with pytest.raises(InvalidInput, match="begin it with sequence_start"):
            sequences.find(name())

    asyncio.run(scenario())


def test_a_sequence_is_its_keys_alone(world):
    sequences, lane, _ = world

    async def scenario():
        sequences.start(name(key="mine"), None, lane, FRAMES)
        assert sequences.find(name(key="mine"))
        for other in (name(), name(key="yours"), name("1", key="mine"), name(key="mine", version="1")):
            with pytest.raises(InvalidInput):
                sequences.find(other)

    asyncio.run(scenario())


def test_there_are_so_many_and_idle_ones_make_room(world):
    sequences, lane, clock = world

    async def scenario():
        for identity in (1, 2):
            sequences.start(name(identity), None, lane, FRAMES)
        with pytest.raises(Overloaded):
            sequences.start(name(3), None, lane, FRAMES)
        clock.now = 59.0
        second = sequences.find(name(2))
        await answered(lane, sequences.filter(second, FRAMES, last=False))
        clock.now = 61.0
        sequences.start(name(3), None, lane, FRAMES)
        with pytest.raises(InvalidInput):
            sequences.find(name(1))
        assert sequences.find(name(2)) is second
        assert len(lane.open_streams) == len(sequences) == 2

    asyncio.run(scenario())


def test_idle_ones_end_by_themselves_but_not_one_that_is_being_answered():
    lane = ManualLane()

    async def scenario():
        sequences = Sequences(4, 0.05, asyncio.get_running_loop().time)
        sequences.start(name(1), None, lane, FRAMES)
        busy = sequences.start(name(2), None, lane, FRAMES)
        waiting = asyncio.ensure_future(sequences.filter(busy, FRAMES, last=False))
        await asyncio.sleep(0.3)
        assert len(sequences) == len(lane.open_streams) == 1
        lane.answer()
        await waiting
        await asyncio.sleep(0.3)
        assert not len(sequences)
        assert not lane.open_streams

    asyncio.run(scenario())


def test_a_start_replaces_and_those_who_waited_are_told(world):
    sequences, lane, _ = world

    async def scenario():
        old = sequences.start(name(), None, lane, FRAMES)
        waiting = asyncio.ensure_future(sequences.filter(old, FRAMES, last=False))
        await asyncio.sleep(0)
        new = sequences.start(name(), None, lane, FRAMES)
        with pytest.raises(InvalidInput, match="anew"):
            await waiting
        assert sequences.find(name()) is new
        assert len(lane.open_streams) == 1
        lane.answer()  # the engine had it already: nobody is answered twice

    asyncio.run(scenario())


def test_a_failure_ends_the_sequence_for_all_who_wait(world):
    sequences, lane, _ = world

    async def scenario():
        sequence = sequences.start(name(), None, lane, FRAMES)
        waiting = [asyncio.ensure_future(sequences.filter(sequence, FRAMES, last=False)) for _ in range(2)]
        await asyncio.sleep(0)
        lane.answer(BackendFailure("the engine failed"))
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(outcomes[0], BackendFailure)
        assert isinstance(outcomes[1], InvalidInput)
        assert not len(sequences)
        assert not lane.open_streams

    asyncio.run(scenario())


def test_a_client_that_leaves_with_the_last_request_frees_the_slot(world):
    sequences, lane, _ = world

    async def scenario():
        sequence = sequences.start(name(), None, lane, FRAMES)
        waiting = asyncio.ensure_future(sequences.filter(sequence, FRAMES, last=True))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert not lane.open_streams

    asyncio.run(scenario())


def test_a_draining_server_sends_its_sequences_elsewhere(world):
    sequences, lane, _ = world

    async def scenario():
        sequences.start(name(), None, lane, FRAMES)
        lane.draining = True
        with pytest.raises(ShuttingDown, match="parameter state"):
            sequences.find(name())

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("fields", "field_"),
    [
        ({"seed": 4}, "parameters.seed"),
        ({"elastic": True}, "parameters.elastic"),
        ({"state": "token"}, "parameters.state"),
        ({"return": ["posterior"]}, "outputs"),
    ],
)
def test_what_was_chosen_at_the_start_stays(world, fields, field_):
    sequences, lane, _ = world

    async def scenario():
        sequence = sequences.start(name(), None, lane, FRAMES)
        sequences.check_kept(sequence, body(seed=3, elastic=False))
        with pytest.raises(InvalidInput) as refused:
            sequences.check_kept(sequence, body(**fields))
        assert refused.value.fields[0][0] == field_

    asyncio.run(scenario())


def test_the_parameters_of_sequences():
    assert read_control({"sequence_id": 0}) == read_control({"sequence_id": ""}) == read_control({}) == SequenceControl()
    assert read_control({"sequence_id": 2**64 - 1, "sequence_end": True}) == SequenceControl(2**64 - 1, False, True)
    assert read_control({"sequence_id": "a", "sequence_start": True}) == SequenceControl("a", True, False)
    for wrong in (
        {"sequence_id": -1},
        {"sequence_id": 2**64},
        {"sequence_id": True},
        {"sequence_id": 1.5},
        {"sequence_id": "a" * 129},
        {"sequence_id": 1, "sequence_start": 1},
        {"sequence_start": True},
        {"sequence_id": 0, "sequence_end": True},
    ):
        with pytest.raises(InvalidInput):
            read_control(wrong)


# Against a live server.


@pytest.fixture
def infer(live, chorale):
    def post(parameters, frames=1, status=200, outputs=None, **headers):
        tensor = {"name": "x", "shape": [frames, 88], "datatype": "FP32", "data": chorale[:frames].ravel().tolist()}
        body = {"inputs": [tensor], "parameters": parameters}
        body |= {} if outputs is None else {"outputs": [{"name": name} for name in outputs]}
        reply = httpx.post(f"{live.url}/v2/models/jsb-filter/infer", json=body, headers=headers, timeout=60)
        assert reply.status_code == status, reply.text
        return reply.json()

    return post


def test_another_key_neither_finds_a_sequence_nor_takes_its_state(infer):
    begun = infer({"sequence_id": 5, "sequence_start": True}, **{"X-API-Key": "mine"})
    state = begun["parameters"]["state"]
    assert "sequence_start" in infer({"sequence_id": 5}, status=400, **{"X-API-Key": "yours"})["error"]
    assert "another API key" in infer({"state": state}, status=400, **{"X-API-Key": "yours"})["error"]
    assert infer({"sequence_id": 5, "sequence_end": True}, **{"X-API-Key": "mine"})["parameters"]["frame"] == 2


def test_more_sequences_than_the_server_takes_are_refused_with_a_time_to_come_back(infer, live):
    taken = [f"full-{i}" for i in range(4)]
    for identity in taken:
        infer({"sequence_id": identity, "sequence_start": True})
    assert "4 sequences are live" in infer({"sequence_id": "one more", "sequence_start": True}, status=503)["error"]
    assert live.app.state.server.sequences
    for identity in taken:
        infer({"sequence_id": identity, "sequence_end": True})
    assert not len(live.app.state.server.sequences)


def test_what_costs_nothing_may_be_asked_for_later(infer):
    infer({"sequence_id": 71, "sequence_start": True}, outputs=["surprise"])
    assert "kl" in {output["name"] for output in infer({"sequence_id": 71})["outputs"]}
    last = infer({"sequence_id": 71, "sequence_end": True}, outputs=["log_likelihood"])
    assert last["parameters"]["frame"] == 3
    assert np.isfinite(last["outputs"][0]["data"]).all()


def test_frames_that_do_not_fit_leave_the_sequence_where_it_was(infer):
    infer({"sequence_id": 6, "sequence_start": True}, frames=2)
    assert "stepps" in infer({"sequence_id": 6, "stepps": 1}, status=400)["error"]
    assert "seed" in infer({"sequence_id": 6, "seed": 9}, status=400)["error"]
    assert infer({"sequence_id": 6, "sequence_end": True})["parameters"]["frame"] == 3


def test_a_filter_has_no_other_method_and_a_bad_state_is_a_400(infer):
    assert "one of filter" in infer({"method": "encode"}, status=400)["error"]
    assert "state" in infer({"state": "elbow1.nonsense.x"}, status=400)["error"]
    assert "deadline_ms" in infer({"deadline_ms": 5}, status=400)["error"]
