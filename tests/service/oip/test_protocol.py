"""The protocol by hand, in process: what is answered, and what no client of good will would send."""

from __future__ import annotations

import contextlib
import gzip
import json
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.errors import ElbowError
from service.oip.wire import HEAD_LENGTH, read_inference
from service.scheduler.static_lane import Counts

ROWS = np.random.default_rng(0).random((2, 784)).astype(np.float32)
HERE = "/v2/models/digits/infer"
STATIC = {"name": "x", "shape": [2, 784], "datatype": "FP32", "data": ROWS.ravel().tolist()}


@pytest.fixture
def call(service):
    """call(body | bytes, path, **headers): POST; the body as JSON unless it is bytes."""
    service.scheduler.stats = lambda: {"digits/2": Counts(rows_done=7, ticks=3)}
    service.scheduler.stream_stats = dict

    def post(body, path=HERE, **headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return service.run(service.http.post(path, content=content, headers={name.replace("_", "-"): v for name, v in headers.items()}))

    return post


def framed(head, *tensors, length=None):
    """(bytes, headers) of a binary request."""
    text = json.dumps(head).encode()
    return b"".join([text, *tensors]), {HEAD_LENGTH: str(len(text) if length is None else length)}


def binary(shape=(2, 784), datatype="FP32", size=None, **more):
    return {"name": "x", "shape": list(shape), "datatype": datatype, "parameters": {"binary_data_size": size}} | more


def outputs(reply):
    assert reply.status_code == 200, reply.text
    return {output["name"]: output for output in reply.json()["outputs"]}


def refused(reply, message, status=400):
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/problem+json"
    assert message in reply.json()["error"], reply.json()["error"]


def test_the_server_says_what_it_has(service):
    for path in ("/v2", "/v2/"):
        said = service.get(path).json()
        assert said["name"] == "elbow"
        assert "binary_tensor_data" in said["extensions"]
        assert "model_repository" not in said["extensions"]  # there is no admin key, so there are no such routes
    assert service.get("/v2/health/live").json() == {"live": True}
    assert service.get("/v2/health/ready").json() == {"ready": True}
    assert service.get("/v2/models").json() == {"models": ["digits", "direct", "images", "recurrent"]}
    service.app.state.server.draining = True
    assert service.get("/v2/health/ready").status_code == 503
    assert service.get("/v2/models/digits/ready").status_code == 503


def test_metadata_lists_the_tensors_of_every_method(service):
    said = service.get("/v2/models/recurrent").json()
    assert said["versions"] == ["1"]
    names = {method: {tensor["name"] for tensor in tensors["outputs"]} for method, tensors in said["methods"].items()}
    assert {"mu", "log_sigma", "elbo", "kl", "steps_used", "stop_reason", "trace", "z", "reconstruction", "carry"} <= names["encode"]
    assert {"log_px", "elbo", "elbo_quantile"} <= names["score"]
    assert {tensor["name"] for tensor in said["methods"]["refine"]["inputs"]} == {"x", "mask", "mu", "log_sigma", "step", "carry"}
    assert said["outputs"] == said["methods"]["encode"]["outputs"]
    assert service.get("/v2/models/digits/versions/1").json()["versions"] == ["1", "2"]
    assert service.get("/v2/models/digits/versions/1/ready").json() == {"name": "digits", "ready": True}
    assert service.get("/v2/models/images/config").json()["input"][0]["dims"] == [28, 28]


def test_every_output_that_is_listed_can_be_asked_for(service, call):
    for method, tensors in service.get("/v2/models/recurrent").json()["methods"].items():
        known = {"mu": np.zeros((2, 4)), "log_sigma": np.zeros((2, 4))}
        inputs = [] if method == "generate" else [STATIC]
        if method == "refine":
            carry = outputs(call({"inputs": [STATIC], "outputs": [{"name": "carry"}]}, "/v2/models/recurrent/infer"))["carry"]
            inputs = [
                STATIC,
                carry,
                *({"name": n, "shape": [2, 4], "datatype": "FP32", "data": v.ravel().tolist()} for n, v in known.items()),
            ]
        body = {
            "inputs": inputs,
            "parameters": {"method": method, "samples": 2},
            "outputs": [{"name": o["name"]} for o in tensors["outputs"]],
        }
        for output, listed in zip(outputs(call(body, "/v2/models/recurrent/infer")).values(), tensors["outputs"], strict=True):
            assert (output["name"], output["datatype"]) == (listed["name"], listed["datatype"])
            assert len(output["shape"]) == len(listed["shape"])
            assert all(size in (-1, given) for size, given in zip(listed["shape"], output["shape"], strict=True))
            assert len(output["data"]) == np.prod(output["shape"])


@pytest.mark.parametrize("data", [ROWS.ravel().tolist(), ROWS.tolist()], ids=["flat", "nested"])
def test_json_rows_reach_the_scheduler_as_they_are(service, call, data):
    reply = call({"id": "a b", "inputs": [STATIC | {"data": data}], "parameters": {"steps": 3, "seed": 4, "deadline_ms": 100}})
    assert reply.json()["id"] == "a b"
    assert reply.json()["model_version"] == "2"
    assert outputs(reply)["mu"]["data"][4] == 1
    job = service.scheduler.jobs[-1]
    assert np.array_equal(job.x, ROWS)
    assert (job.budget.steps, job.budget.elastic, job.seeds.tolist()) == (3, True, [4, 4])


@pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64", "BF16", "UINT8", "INT64", "BOOL"])
def test_numbers_of_any_kind_are_rows(service, call, datatype):
    values = np.random.default_rng(1).integers(0, 2, (2, 784))
    kinds = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8", "UINT8": "u1", "INT64": "<i8", "BOOL": "?"}
    raw = (
        (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes() if datatype == "BF16" else values.astype(kinds[datatype]).tobytes()
    )
    content, headers = framed({"inputs": [binary(datatype=datatype, size=len(raw))]}, raw)
    assert call(content, **headers).status_code == 200
    assert np.array_equal(service.scheduler.jobs[-1].x, values)


def test_a_raw_body_is_the_one_input(service, call):
    reply = call(ROWS.tobytes(), **{HEAD_LENGTH: "0", "Content-Type": "application/octet-stream"})
    head = json.loads(reply.content[: int(reply.headers[HEAD_LENGTH])])
    assert all("binary_data_size" in output["parameters"] for output in head["outputs"])
    assert np.array_equal(service.scheduler.jobs[-1].x, ROWS)
    refused(call(ROWS.tobytes()[:-4], **{HEAD_LENGTH: "0"}), "3136 bytes each")
    refused(call(b"", **{HEAD_LENGTH: "0"}), "3136 bytes each")


def test_outputs_are_binary_each_as_asked_and_in_the_order_asked(call):
    asked = [
        {"name": "stop_reason", "parameters": {"binary_data": True}},
        {"name": "mu", "parameters": {"binary_data": False}},
        {"name": "elbo"},
    ]
    reply = call({"inputs": [STATIC], "outputs": asked, "parameters": {"binary_data_output": True}})
    length = int(reply.headers[HEAD_LENGTH])
    stop, mu, elbo = json.loads(reply.content[:length])["outputs"]
    assert stop["parameters"]["binary_data_size"] == 2 * (4 + 5)
    assert mu["data"][:4] == [0, 0, 0, 0]
    assert reply.content[length:] == b"\x05\0\0\0steps" * 2 + np.float32([-90, -90]).tobytes()
    assert elbo["parameters"]["binary_data_size"] == 8


def test_only_what_is_asked_is_computed(service, call):
    call({"inputs": [STATIC], "outputs": [{"name": "steps_used"}]})
    assert not service.scheduler.jobs[-1].ask.measure
    call({"inputs": [STATIC], "outputs": [{"name": "trace"}, {"name": "reconstruction"}]})
    ask = service.scheduler.jobs[-1].ask
    assert (ask.trace, ask.mean, ask.z) == (True, True, 0)


def test_a_number_that_is_not_finite_is_null_in_json(serve, call, service, make_card):
    service.scheduler._result_of = service.scheduler._result

    def result(job):
        made = service.scheduler._result_of(job)
        made.elbo[0] = np.nan
        return made

    service.scheduler._result = result
    assert outputs(call({"inputs": [STATIC]}))["elbo"]["data"] == [None, -90.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [-1, 784]}, "inputs[0].shape[0]: must be at least 0"),
        ({"shape": [2, 785]}, "has 1568 numbers, the shape [2, 785] has 1570 elements"),
        ({"shape": [2**40, 2**40]}, f"has {2**80} elements"),
        ({"shape": [2**63, 2]}, "inputs[0].shape[0]: must be less than"),
        ({"shape": [0, 784], "data": []}, "has a size of 0"),
        ({"shape": [0, 2**62, 2**62], "data": []}, "has a size of 0"),
        ({"shape": []}, "inputs[0].shape"),
        ({"shape": [1] * 9}, "inputs[0].shape"),
        ({"shape": [2.5, 784]}, "inputs[0].shape[0]: must be a whole number"),
        ({"shape": [True, 784]}, "inputs[0].shape[0]: must be a whole number"),
        ({"shape": "2"}, "inputs[0].shape: must be a list"),
        ({"datatype": "FP8"}, "inputs[0].datatype: must be one of"),
        ({"datatype": "BYTES"}, "must be a flat list of 1568 strings"),
        ({"datatype": "BF16"}, "BF16 has no JSON form"),
        ({"datatype": "INT32"}, "whole numbers"),
        ({"datatype": "BOOL"}, "true or false"),
        ({"data": None}, "inputs[0].data: is required"),
        ({"data": 3}, "must be a list"),
        ({"data": ["a"] * 1568}, "must be numbers"),
        ({"data": [[0.0] * 784, [0.0] * 783]}, "must be numbers, flat or nested"),
        ({"data": [[[0.0]]]}, "a nest of 1 × 1 × 1"),
        ({"data": [2.0, *([0.0] * 1567)]}, "x[0][0]: 2 is outside [0, 1]"),
        ({"data": [1e39, *([0.0] * 1567)]}, "x[0][0]: 1e+39 is outside"),
        ({"shape": [1, 2, 784]}, "x[0][0]: is a list, nested too deeply"),
        ({"shape": [1568]}, "x[0]: "),
        ({"shape": [784, 2]}, "x: has 784 rows, this server takes at most 20 in one request"),
        ({"name": "y"}, "encode takes x, mask"),
        ({"parameters": {"shared_memory_region": "r"}}, "is not supported"),
        ({"parameters": {"binary_data_size": 6272}}, "is given beside data"),
        ({"extra": 1}, "inputs[0].extra: is not a field"),
    ],
)
def test_a_tensor_that_does_not_fit_is_a_400_that_says_why(service, call, change, message):
    refused(call({"inputs": [STATIC | change]}), message)
    assert not service.scheduler.jobs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": [STATIC, STATIC]}, "is there twice"),
        ({"inputs": [{}] * 65}, "inputs"),
        ({"inputs": []}, "inputs.x: is required by encode"),
        ({"inputs": {}}, "inputs: must be a list"),
        ({"outputs": [{"name": "nothing"}]}, 'outputs[0]: there is no "nothing"'),
        ({"outputs": [{"name": "mu"}, {"name": "mu"}]}, "names an output twice"),
        ({"outputs": [{"name": "mu", "parameters": {"classification": 3}}]}, "classification: is not supported"),
        ({"outputs": [{"name": "mu", "parameters": {"binary_data": 1}}]}, "must be true or false"),
        ({"parameters": {"binary_data_output": "yes"}}, "must be true or false"),
        ({"parameters": {"method": "dream"}}, "one of encode, refine, reconstruct, score, generate"),
        ({"parameters": {"method": 3}}, "has no method"),
        ({"parameters": {"method": None}}, "has no method"),
        ({"parameters": {"steps": "3"}}, "parameters.steps: must be a whole number"),
        ({"parameters": {"steps": 65}}, "parameters.steps: 65 is more than this model's maximum of 64"),
        ({"parameters": {"samples": 17}}, "maximum of 16"),
        ({"parameters": {"inputs": [[0]]}}, "is no parameter"),
        ({"parameters": {"return": ["z"]}}, "is no parameter"),
        ({"parameters": {"sequence_id": 5}}, "is no filter"),
        ({"parameters": {"timeout": -1}}, "microseconds"),
        ({"parameters": {"timeout": 1, "deadline_ms": 1}}, "beside deadline_ms"),
        ({"parameters": {"triton_enable_empty_final_response": True}}, "parameters.triton_enable_empty_final_response: is not a field"),
        ({"parameters": []}, "parameters"),
        ({"id": 5}, "id"),
        ({"paramters": {}}, "paramters: is not a field"),
    ],
)
def test_a_request_that_does_not_fit_is_a_400_that_says_why(service, call, change, message):
    refused(call({"inputs": [STATIC]} | change), message)
    assert not service.scheduler.jobs


def test_a_posteriors_tensor_is_named_as_it_was_sent(call):
    levels = [{"name": n, "shape": [2, 4], "datatype": "FP32", "data": [0] * 8} for n in ("mu", "log_sigma")]
    carry = {"name": "carry", "shape": [2], "datatype": "BYTES", "data": ["not of a reply", "nor this"]}
    body = {"inputs": [STATIC, carry, *levels], "parameters": {"method": "refine"}}
    refused(call(body, "/v2/models/recurrent/infer"), "carry[0]: ")


@pytest.mark.parametrize("length", ["-1", "x", "1e2", "99999999", "9" * 30, "", "٣"])
def test_a_head_length_that_is_none_is_refused(call, length):
    reply = call({"inputs": [STATIC]}, **{HEAD_LENGTH: length.encode()})
    refused(reply, "must be the length of the JSON head")


def test_a_head_length_that_cuts_the_json_is_malformed(call):
    content, headers = framed({"inputs": [STATIC]}, length=20)
    refused(call(content, **headers), "is not JSON")


@pytest.mark.parametrize(
    ("tensor", "after", "message"),
    [
        (binary(size=6272), b"x" * 6271, "6271 are left"),
        (binary(size=6272), b"\0" * 6273, "1 bytes follow the tensors"),
        (binary(size=6271), b"\0" * 6272, "has 6271 bytes, FP32 of shape [2, 784] has 6272"),
        (binary(size=-1), b"\0" * 6272, "must be the tensor's bytes"),
        (binary(size=2**70), b"\0" * 6272, "must be the tensor's bytes"),
        (binary(size=True), b"\0" * 6272, "must be the tensor's bytes"),
        (binary(size="6272"), b"\0" * 6272, "must be the tensor's bytes"),
        (binary(size=[6272]), b"\0" * 6272, "must be the tensor's bytes"),
        (binary((2**40, 2**40), size=6272), b"\0" * 6272, "has 6272 bytes"),
        (binary((2**60,), "BYTES", size=8), b"\0" * 8, "elements, each a 32-bit length"),
        (binary((1,), "BYTES", size=8), b"\xff\xff\xff\xff" * 2, "elements, each a 32-bit length"),
        (binary((1,), "BYTES", size=5), b"\1\0\0\0\xff", "is not UTF-8"),
        (binary(datatype="BOOL", size=1568), b"\2" * 1568, "0 or 1"),
        (binary(size=6272), np.where(np.arange(1568) == 3, np.nan, 0).astype("<f4").tobytes(), "x[0][3]: nan is outside"),
        (binary(size=6272), np.where(np.arange(1568) == 800, np.inf, 0).astype("<f4").tobytes(), "x[1][16]: inf is outside"),
        (binary(datatype="FP64", size=12544), np.full(1568, 1e300).tobytes(), "x[0][0]: 1e+300 is outside"),
    ],
)
def test_a_binary_tensor_that_lies_is_refused(service, call, tensor, after, message):
    content, headers = framed({"inputs": [tensor]}, after)
    refused(call(content, **headers), message)
    assert not service.scheduler.jobs


def test_binary_data_needs_the_header(call):
    content, _ = framed({"inputs": [binary(size=6272)]})
    refused(call(content), f"needs the header {HEAD_LENGTH}")


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_json_that_is_not_json_is_malformed(call, word):
    body = json.dumps({"inputs": [STATIC]}).replace(str(STATIC["data"][0]), word, 1).encode()
    refused(call(body), "is not a JSON number")


@pytest.mark.parametrize("depth", [70, 1000, 100_000])
def test_deep_nesting_is_refused(call, depth):
    body = b'{"inputs": [{"name": "x", "shape": [1, 784], "datatype": "FP32", "data": ' + b"[" * depth + b"0" + b"]" * depth + b"}]}"
    assert call(body).status_code == 400
    assert call(b"[" * depth + b"]" * depth).status_code == 400


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress, lambda raw: zlib.compress(raw)[2:-4]], ids=["gzip", "zlib", "bare"])
def test_compressed_bodies_are_read(service, call, pack):
    encoding = "gzip" if pack is gzip.compress else "deflate"
    text = json.dumps({"inputs": [binary(size=6272)]}).encode()
    reply = call(pack(text + ROWS.tobytes()), Content_Encoding=encoding, **{HEAD_LENGTH: str(len(text))})
    assert reply.status_code == 200
    assert np.array_equal(service.scheduler.jobs[-1].x, ROWS)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_bomb_is_refused_without_inflating_it(call, encoding):
    engine = zlib.compressobj(9, zlib.DEFLATED, 31 if encoding == "gzip" else 15)
    block = bytes(2**20)
    bomb = b"".join(engine.compress(block) for _ in range(512)) + engine.flush()  # half a gigabyte of zeros in half a megabyte
    assert len(bomb) < 2**20
    refused(call(bomb, Content_Encoding=encoding), "inflated, the body is larger", status=413)


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-9], lambda raw: raw + b"more", lambda raw: b"\x1f\x8b" + raw, lambda raw: b"", lambda raw: raw + raw]
)
def test_a_damaged_compressed_body_is_malformed(call, damage):
    assert call(damage(gzip.compress(json.dumps({"inputs": [STATIC]}).encode())), Content_Encoding="gzip").status_code == 400


def test_media_and_encodings_that_are_not_read(call):
    refused(call({"inputs": [STATIC]}, Content_Encoding="br"), "content encoding 'br'", status=415)
    refused(call({"inputs": [STATIC]}, Content_Type="text/csv"), "content type 'text/csv'", status=415)
    refused(call(bytes(2**20 + 1)), "larger than this server's", status=413)


@pytest.mark.parametrize(
    ("accept", "encoding"),
    [("gzip", "gzip"), ("deflate", "deflate"), ("gzip, deflate, br", "gzip"), ("gzip;q=0, deflate", "deflate"), ("*", "gzip"), ("br", None),
     ("identity, gzip;q=0.5", None), ("gzip;q=x", None), ("", None)],
)  # fmt: skip
def test_replies_are_compressed_as_asked(call, accept, encoding):
    body = {"inputs": [STATIC], "outputs": [{"name": "reconstruction"}]}
    reply = call(body, Accept_Encoding=accept)
    assert reply.headers.get("content-encoding") == encoding
    assert outputs(reply)["reconstruction"]["data"] == [0.5] * 1568
    small = call({"inputs": [STATIC], "outputs": [{"name": "elbo"}]}, Accept_Encoding="gzip")
    assert "content-encoding" not in small.headers


def test_unknown_models_and_tricks_with_paths(call, service):
    for path in ("/v2/models/nobody/infer", "/v2/models/digits/versions/9/infer", "/v2/models/..%2fdigits/infer"):
        reply = call({"inputs": [STATIC]}, path)
        assert reply.status_code == 404
        assert reply.json()["error"].startswith(("Request for unknown model", "there is nothing at"))
    assert service.get("/v2/models/nobody/ready").status_code == 404
    assert service.get(HERE).status_code == 405


def test_refusals_of_the_scheduler_keep_their_status(service, call):
    from service.errors import DeadlineExceeded, Overloaded, QuotaExceeded

    for fault, status in ((Overloaded("full", retry_after_s=2), 503), (DeadlineExceeded("late"), 504), (QuotaExceeded("yours"), 429)):
        service.scheduler.fault = fault
        reply = call({"inputs": [STATIC]})
        assert reply.status_code == status
        assert ("retry-after" in reply.headers) == (status != 504)


def test_statistics_have_the_shape_of_the_extension(service, call):
    call({"inputs": [STATIC]})
    call({"inputs": []})
    (entry,) = service.get("/v2/models/digits/versions/2/stats").json()["model_stats"]
    assert (entry["inference_count"], entry["execution_count"]) == (7, 3)
    assert entry["inference_stats"]["success"]["count"] == entry["inference_stats"]["fail"]["count"] == 1
    assert entry["inference_stats"]["queue"] == {"count": 1, "ns": 250_000}
    assert entry["inference_stats"]["compute_infer"] == {"count": 1, "ns": 1_500_000}
    (batch,) = entry["batch_stats"]
    assert batch["batch_size"] == 2
    assert batch["compute_infer"] == {"count": 1, "ns": 1_500_000}
    assert [one["version"] for one in service.get("/v2/models/digits/stats").json()["model_stats"]] == ["1", "2"]
    assert len(service.get("/v2/models/stats").json()["model_stats"]) == 5


KEYS = ("inputs", "outputs", "parameters", "id", "name", "shape", "datatype", "data", "binary_data_size")
ATOMS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
NESTS = st.recursive(
    ATOMS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5), max_leaves=20
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=300), length=st.none() | st.integers(-1, 300).map(str), body=NESTS)
def test_any_bytes_are_a_request_or_refused(make_card, raw, length, body):
    x = make_card("digits").x
    with contextlib.suppress(ElbowError):
        read_inference(raw, length, x)
    with contextlib.suppress(ElbowError):
        read_inference(json.dumps(body).encode() + raw, length, x)
    text = json.dumps({"inputs": [body] if isinstance(body, dict) else body}).encode()
    with contextlib.suppress(ElbowError):
        read_inference(text + raw, str(len(text)), x)
