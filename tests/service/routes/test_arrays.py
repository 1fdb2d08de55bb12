"""Rows and replies as arrays on the native calls: what JSON says, and no other way round its checks."""

from __future__ import annotations

import contextlib
import gzip
import io

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.errors import ElbowError
from service.tensor_bodies import NPY, NPZ, RAW, rows_of

ROWS = np.random.default_rng(0).random((3, 784)).astype(np.float32)


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def send(service, call, content, media, accept="application/json", **headers):
    return service.post(call, content=content, headers={"Content-Type": media, "Accept": accept, **headers})


def results(reply):
    assert reply.status_code == 200, reply.text
    return reply.json()["results"]


@pytest.mark.parametrize("call", ["encode", "reconstruct", "score"])
@pytest.mark.parametrize(
    ("content", "media"),
    [
        (ROWS.tobytes(), RAW),
        (npy(ROWS), NPY),
        (npy(np.asfortranarray(ROWS)), NPY),
        (npy(ROWS.astype(">f4")), NPY),
        (npy(ROWS.astype(np.float64)), NPY),
    ],
    ids=["raw", "npy", "fortran", "big-endian", "float64"],
)
def test_rows_as_bytes_are_the_rows_in_json(service, call, content, media):
    sent = results(send(service, f"digits/{call}?steps=2&seed=7", content, media))
    assert sent == results(service.post(f"digits/{call}", {"inputs": ROWS.tolist(), "steps": 2, "seed": 7}))
    as_bytes, as_json = service.scheduler.jobs[-2:]
    assert np.array_equal(as_bytes.x, as_json.x)
    assert as_bytes.budget == as_json.budget
    assert np.array_equal(as_bytes.seeds, as_json.seeds)


def test_the_query_holds_the_fields_of_the_body(service):
    query = "steps=3&deadline_ms=50&tolerance=0.5&elastic=false&seed=1,2,3&samples=4&return=elbo,trace"
    reply = results(send(service, f"digits/encode?{query}", ROWS.tobytes(), RAW))
    assert set(reply[0]) == {"elbo", "log_likelihood", "kl", "trace", "steps_used", "stop_reason"}
    job = service.scheduler.jobs[-1]
    assert (job.budget.steps, job.budget.tolerance, job.budget.elastic, job.ask.samples) == (3, 0.5, False, 4)
    assert job.seeds.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("steps=x", "steps"),
        ("steps=65", "steps"),
        ("steps=1&steps=2", "steps"),
        ("stepps=1", "stepps"),
        ("inputs=1", "inputs"),
        ("mask=1", "mask"),
        ("elastic=1", "elastic"),
        ("seed=1,2", "seed"),
        ("deadline_ms=-1", "deadline_ms"),
        ("columns=elbo", "columns"),
        ("seed=[1,2,3]", "seed[0]"),
    ],
)
def test_a_query_that_does_not_fit_is_refused_by_name(service, query, field):
    reply = send(service, f"digits/encode?{query}", ROWS.tobytes(), RAW)
    assert reply.status_code == 422
    assert reply.json()["errors"][0]["field"].startswith(field[:4])
    assert not service.scheduler.jobs


def broken(row, column, value):
    rows = ROWS.copy()
    rows[row, column] = value
    return rows


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (broken(1, 5, np.nan), "inputs[1][5]: nan is outside [0, 1], the range of this model's x"),
        (broken(2, 0, np.inf), "inputs[2][0]: inf is outside [0, 1], the range of this model's x"),
        (broken(0, 3, -0.5), "inputs[0][3]: -0.5 is outside [0, 1], the range of this model's x"),
        (ROWS[:, :783], "inputs[0]: has 783 numbers, this model takes 784 numbers per row"),
        (ROWS[0], "inputs[0]: "),
        (ROWS[None], "inputs[0][0]: is a list, nested too deeply"),
        (np.float32(1), "inputs: must be a list of rows, not 1.0"),
        (ROWS[:0], "inputs: is empty: send at least one row"),
        (np.tile(ROWS, (7, 1)), "inputs: has 21 rows, this server takes at most 20 in one request"),
        (ROWS.astype(complex), "inputs: the .npy file holds complex128: only numbers are read here"),
        (ROWS.astype("S4"), "inputs: the .npy file holds |S4: only numbers are read here"),
        (np.zeros(3, [("a", "f4")]), "inputs: the .npy file holds [('a', '<f4')]"),
    ],
)
def test_an_array_that_does_not_fit_gets_the_message_that_json_gets(service, array, message):
    reply = send(service, "digits/encode", npy(array), NPY)
    assert reply.status_code == 422
    assert reply.json()["error"].startswith(message)
    assert not service.scheduler.jobs


def test_nested_rows_are_named_by_their_own_path(service):
    rows = np.zeros((2, 28, 28))
    rows[1, 4, 5] = 2
    assert send(service, "images/encode", npy(rows), NPY).json()["error"].startswith("inputs[1][4][5]: 2 is outside")


def test_an_object_array_is_never_unpickled(service):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    reply = send(service, "digits/encode", npy(np.array([Bomb()], object), allow_pickle=True), NPY)
    assert reply.status_code == 422
    assert "only numbers are read here" in reply.json()["error"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        b"not numpy at all",
        npy(ROWS)[:100],
        b"\x93NUMPY\x01\x00\xff\xff" + b" " * 65535,
        b"\x93NUMPY\x03\x00\x10\x00\x00\x00{'a': 1}        ",
        b"\x93NUMPY\x01\x00\x10\x00" + b"((((((((((((((((",
        b"\x93NUMPY\x02\x00\xff\xff\xff\x7f{}",
    ],
)
def test_what_is_no_npy_file_is_malformed(service, content):
    assert send(service, "digits/encode", content, NPY).status_code == 400


@pytest.mark.parametrize("shape", ["(1000000000000, 784)", "(3, 785)", "(3, -784)", f"({2**62}, {2**62})", "(0, 784)", "(True, 784)"])
def test_a_header_that_lies_about_the_size_allocates_nothing(service, shape):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}".ljust(127) + "\n"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + ROWS.tobytes()
    assert send(service, "digits/encode", content, NPY).status_code in (400, 422)


@pytest.mark.parametrize("size", [0, 1, 784 * 4 - 1, 784 * 4 + 1])
def test_raw_rows_that_are_not_whole_are_refused(service, size):
    reply = send(service, "digits/encode", bytes(size), RAW)
    assert reply.status_code == 422
    assert "3136 bytes each" in reply.json()["error"]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(head=st.binary(max_size=200), version=st.sampled_from([b"\x01\x00", b"\x02\x00", b"\x03\x00"]), text=st.text(max_size=80))
def test_any_bytes_are_rows_or_refused(make_card, head, version, text):
    x = make_card("digits").x
    literal = text.encode()
    for raw in (head, b"\x93NUMPY" + version + head, b"\x93NUMPY\x01\x00" + len(literal).to_bytes(2, "little") + literal):
        with contextlib.suppress(ElbowError):
            rows_of(raw, NPY, x)


def test_compressed_rows_are_read_and_a_bomb_is_not_inflated(service):
    assert len(results(send(service, "digits/encode", gzip.compress(ROWS.tobytes()), RAW, **{"Content-Encoding": "gzip"}))) == 3
    bomb = gzip.compress(bytes(2**24))
    assert send(service, "digits/encode", bomb, RAW, **{"Content-Encoding": "gzip"}).status_code == 413
    assert send(service, "digits/encode", b"x", RAW, **{"Content-Encoding": "br"}).status_code == 415


def test_an_npz_reply_has_every_column(service):
    reply = send(service, "digits/encode?steps=2", npy(ROWS), NPY, NPZ)
    assert reply.headers["content-type"] == NPZ
    assert reply.headers["x-elbow-model"] == "digits/2"
    assert reply.headers["x-elbow-precision"] == "float32"
    assert reply.headers["server-timing"] == "queue;dur=0.2500, compute;dur=1.5000"
    with np.load(io.BytesIO(reply.content), allow_pickle=False) as columns:
        assert set(columns) == {"mu", "log_sigma", "elbo", "log_likelihood", "kl", "steps_used", "stop_reason", "step"}
        assert columns["mu"][:, 0].tolist() == [0, 1, 2]
        assert columns["stop_reason"].tolist() == ["steps"] * 3
        assert columns["elbo"].dtype == np.float32


def test_columns_choose_what_is_computed(service):
    reply = send(service, "recurrent/encode?columns=trace,carry,z,reconstruction&steps=2&samples=3", npy(ROWS), NPY, NPZ)
    with np.load(io.BytesIO(reply.content), allow_pickle=False) as columns:
        assert {name: columns[name].shape for name in columns} == {
            "trace": (3, 3),
            "carry": (3,),
            "z": (3, 3, 4),
            "reconstruction": (3, 784),
        }
    send(service, "digits/encode?columns=steps_used", npy(ROWS), NPY, NPZ)
    assert not service.scheduler.jobs[-1].ask.measure


def test_one_column_goes_as_npy_or_raw(service):
    reply = send(service, "digits/encode?columns=mu", npy(ROWS), NPY, NPY)
    mu = np.load(io.BytesIO(reply.content), allow_pickle=False)
    assert mu.shape == (3, 4)
    raw = send(service, "digits/encode?columns=mu", npy(ROWS), NPY, RAW)
    shape = [int(size) for size in raw.headers["x-elbow-shape"].split(",")]
    assert np.array_equal(np.frombuffer(raw.content, raw.headers["x-elbow-dtype"]).reshape(shape), mu)
    assert raw.headers["x-elbow-column"] == "mu"
    assert send(service, "digits/score", ROWS.tobytes(), RAW, RAW).headers["x-elbow-column"] == "log_px"
    assert send(service, "digits/reconstruct", ROWS.tobytes(), RAW, RAW).headers["x-elbow-shape"] == "3,784"


def test_json_in_and_arrays_out(service):
    body = {"inputs": ROWS.tolist(), "steps": 1}
    reply = service.post("digits/encode?columns=elbo", body, headers={"Accept": NPY})
    assert np.load(io.BytesIO(reply.content)).tolist() == [-90.0] * 3
    for query, extra in (("columns=elbo,mu", {}), ("columns=nothing", {}), ("steps=1", {}), ("", {"return": ["elbo"]})):
        assert service.post(f"digits/encode?{query}", body | extra, headers={"Accept": NPY}).status_code == 422


def test_events_follow_rows_of_bytes(service):
    reply = send(service, "digits/encode?steps=1", ROWS[:1].tobytes(), RAW, "text/event-stream")
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.text.count("event: step") == 2
    assert "event: done" in reply.text


def test_the_other_calls_take_json_only(service):
    assert send(service, "digits/refine", ROWS.tobytes(), RAW).status_code == 415
    assert send(service, "digits/generate", ROWS.tobytes(), RAW).status_code == 415
