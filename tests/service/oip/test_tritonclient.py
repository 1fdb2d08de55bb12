"""tritonclient, sync and asyncio, with its defaults, against a live server; its answers are those of the native calls."""

from __future__ import annotations

import asyncio

import httpx
import numpy as np
import pytest

http = pytest.importorskip("tritonclient.http")
aio = pytest.importorskip("tritonclient.http.aio")
from tritonclient.utils import InferenceServerException, np_to_triton_dtype  # noqa: E402


def tensor(name, array, binary=True):
    given = http.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    given.set_data_from_numpy(array, binary_data=binary)
    return given


@pytest.fixture
def client(live):
    with http.InferenceServerClient(live.address) as client:
        yield client


@pytest.fixture
def native(live):
    def post(call, body):
        reply = httpx.post(f"{live.url}/v1/models/{call}", json=body, timeout=60)
        assert reply.status_code == 200, reply.text
        return reply.json()

    return post


def test_the_server_and_its_models_are_known(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("mnist-iterative")
    assert client.is_model_ready("mnist-iterative", "1")
    assert not client.is_model_ready("nobody")
    assert client.get_server_metadata()["name"] == "elbow"
    metadata = client.get_model_metadata("mnist-iterative")
    assert metadata["platform"] == "onnx_onnxv1"
    assert metadata["inputs"][0] == {"name": "x", "datatype": "FP32", "shape": [-1, 784], "optional": False}
    config = client.get_model_config("mnist-iterative")
    assert config["max_batch_size"] == 10_000
    assert config["input"][0] == {"name": "x", "data_type": "TYPE_FP32", "dims": [784], "optional": False}
    assert client.get_model_config("jsb-filter")["sequence_batching"]["max_sequence_idle_microseconds"] == 60_000_000


def test_encode_with_defaults_equals_the_native_call_bit_for_bit(client, native, digits):
    reply = client.infer("mnist-iterative", [tensor("x", digits)])
    wanted = native("mnist-iterative/encode", {"inputs": digits.tolist()})["results"]
    mu, log_sigma = ([row["posterior"]["levels"][0][name] for row in wanted] for name in ("mu", "log_sigma"))
    assert np.array_equal(reply.as_numpy("mu"), np.float32(mu))
    assert np.array_equal(reply.as_numpy("log_sigma"), np.float32(log_sigma))
    assert np.array_equal(reply.as_numpy("elbo"), np.float32([row["elbo"] for row in wanted]))
    assert reply.as_numpy("steps_used").tolist() == [row["steps_used"] for row in wanted]
    assert reply.as_numpy("stop_reason").tolist() == [b"steps"] * 4
    response = reply.get_response()
    assert response["model_name"] == "mnist-iterative"
    assert all("binary_data_size" in output["parameters"] for output in response["outputs"])


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_inputs_and_outputs_go_either_way(client, digits, binary_in, binary_out, compression):
    outputs = [http.InferRequestedOutput(name, binary_data=binary_out) for name in ("elbo", "reconstruction", "stop_reason")]
    reply = client.infer(
        "mnist-iterative",
        [tensor("x", digits, binary_in)],
        model_version="1",
        outputs=outputs,
        request_id="seven",
        parameters={"steps": 2, "seed": 5},
        request_compression_algorithm=compression,
        response_compression_algorithm=compression,
    )
    same = client.infer("mnist-iterative", [tensor("x", digits)], outputs=outputs, parameters={"steps": 2, "seed": 5})
    assert reply.get_response()["id"] == "seven"
    assert [output["name"] for output in reply.get_response()["outputs"]] == ["elbo", "reconstruction", "stop_reason"]
    assert np.array_equal(reply.as_numpy("reconstruction"), same.as_numpy("reconstruction"))
    assert reply.as_numpy("reconstruction").shape == (4, 784)
    assert np.array_equal(reply.as_numpy("elbo"), same.as_numpy("elbo"))


def test_reconstruct_and_score_are_methods(client, native, digits):
    reply = client.infer("mnist-iterative", [tensor("x", digits)], parameters={"method": "reconstruct", "steps": 3, "samples": 2})
    wanted = native("mnist-iterative/reconstruct", {"inputs": digits.tolist(), "steps": 3, "samples": 2})["results"]
    assert np.array_equal(reply.as_numpy("reconstruction"), np.float32([row["reconstruction"]["mean"] for row in wanted]))
    assert np.array_equal(reply.as_numpy("samples"), np.float32([row["reconstruction"]["samples"] for row in wanted]))
    reply = client.infer("mnist-iterative", [tensor("x", digits)], parameters={"method": "score", "samples": 20, "steps": 2})
    wanted = native("mnist-iterative/score", {"inputs": digits.tolist(), "samples": 20, "steps": 2})["results"]
    assert np.array_equal(reply.as_numpy("log_px"), np.float32([row["log_px"] for row in wanted]))
    assert np.array_equal(reply.as_numpy("elbo_quantile"), np.float32([row["elbo_quantile"] for row in wanted]))


def test_k_steps_and_k_more_by_refine_equal_2k(client, digits):
    first = client.infer("mnist-iterative", [tensor("x", digits)], parameters={"steps": 3, "seed": 2})
    again = [tensor(name, first.as_numpy(name)) for name in ("mu", "log_sigma", "step")]
    more = client.infer("mnist-iterative", [tensor("x", digits), *again], parameters={"method": "refine", "steps": 3, "seed": 2})
    at_once = client.infer("mnist-iterative", [tensor("x", digits)], parameters={"steps": 6, "seed": 2})
    assert np.array_equal(more.as_numpy("mu"), at_once.as_numpy("mu"))
    assert np.array_equal(more.as_numpy("step"), at_once.as_numpy("step"))


def test_a_posterior_is_reconstructed_and_two_are_connected(client, digits):
    encoded = client.infer("mnist-iterative", [tensor("x", digits)], parameters={"steps": 2})
    posterior = [tensor(name, encoded.as_numpy(name)) for name in ("mu", "log_sigma")]
    reply = client.infer("mnist-iterative", posterior, parameters={"method": "reconstruct"})
    direct = client.infer("mnist-iterative", [tensor("x", digits)], parameters={"method": "reconstruct", "steps": 2})
    assert np.allclose(reply.as_numpy("reconstruction"), direct.as_numpy("reconstruction"), atol=1e-6)
    ends = [tensor(name, encoded.as_numpy(name)[:2].copy()) for name in ("mu", "log_sigma")]
    line = client.infer("mnist-iterative", ends, parameters={"method": "generate", "count": 5})
    assert np.allclose(line.as_numpy("mean")[[0, 4]], reply.as_numpy("reconstruction")[:2], atol=1e-5)
    drawn = client.infer("mnist-iterative", [], parameters={"method": "generate", "count": 3, "seed": 1})
    assert drawn.as_numpy("mean").shape == (3, 784)


def test_a_hidden_entry_does_not_matter(client, digits):
    mask = np.ones_like(digits)
    mask[:, :100] = 0
    other = digits.copy()
    other[:, :100] = 1 - other[:, :100]
    a, b = (client.infer("mnist-iterative", [tensor("x", x), tensor("mask", mask)], parameters={"steps": 2}) for x in (digits, other))
    assert np.array_equal(a.as_numpy("mu"), b.as_numpy("mu"))


def test_a_sequence_in_pieces_equals_the_native_filter_at_once(client, native, chorale):
    whole = native("jsb-filter/filter", {"frames": chorale.tolist(), "seed": 3})["results"]
    pieces = []
    for start, stop in ((0, 1), (1, 6), (6, 12)):
        reply = client.infer(
            "jsb-filter",
            [tensor("x", chorale[start:stop].copy())],
            sequence_id=77,
            sequence_start=start == 0,
            sequence_end=stop == 12,
            parameters={"seed": 3},
        )
        pieces.append(reply)
        assert reply.get_response()["parameters"]["frame"] == stop
    elbo = np.concatenate([piece.as_numpy("elbo") for piece in pieces])
    assert np.allclose(elbo, [result["elbo"] for result in whole], atol=1e-4)
    assert np.concatenate([piece.as_numpy("frame") for piece in pieces]).tolist() == list(range(12))
    with pytest.raises(InferenceServerException, match="sequence_start"):
        client.infer("jsb-filter", [tensor("x", chorale[:1].copy())], sequence_id=77)


def test_the_state_of_a_reply_begins_another_sequence_or_stands_alone(client, native, chorale):
    whole = native("jsb-filter/filter", {"frames": chorale.tolist(), "seed": 3})["results"]
    begun = client.infer("jsb-filter", [tensor("x", chorale[:5].copy())], sequence_id="a", sequence_start=True, parameters={"seed": 3})
    state = begun.get_response()["parameters"]["state"]
    wanted = [result["elbo"] for result in whole[5:]]
    moved = client.infer(
        "jsb-filter",
        [tensor("x", chorale[5:].copy())],
        sequence_id="b",
        sequence_start=True,
        sequence_end=True,
        parameters={"state": state},
    )
    assert np.allclose(moved.as_numpy("elbo"), wanted, atol=1e-4)
    alone = client.infer("jsb-filter", [tensor("x", chorale[5:].copy())], parameters={"state": state})
    assert np.array_equal(alone.as_numpy("elbo"), moved.as_numpy("elbo"))
    native_too = native("jsb-filter/filter", {"frames": chorale[5:].tolist(), "state": state})["results"]
    assert np.allclose([result["elbo"] for result in native_too], wanted, atol=1e-4)
    client.infer("jsb-filter", [tensor("x", chorale[5:6].copy())], sequence_id="a", sequence_end=True)


def test_what_a_frame_shows_is_asked_for_at_the_start(client, chorale):
    names = ("elbo", "mu", "reconstruction", "prediction")
    outputs = [http.InferRequestedOutput(name) for name in names]
    reply = client.infer("jsb-filter", [tensor("x", chorale)], outputs=outputs, sequence_id=9, sequence_start=True)
    assert reply.as_numpy("mu").shape == (12, 100)
    assert reply.as_numpy("reconstruction").shape == reply.as_numpy("prediction").shape == (12, 88)
    client.infer("jsb-filter", [tensor("x", chorale)], outputs=outputs[:2], sequence_id=9, sequence_end=True)
    client.infer("jsb-filter", [tensor("x", chorale)], sequence_id=9, sequence_start=True)
    with pytest.raises(InferenceServerException, match="name it there"):
        client.infer("jsb-filter", [tensor("x", chorale)], outputs=outputs, sequence_id=9, sequence_end=True)
    client.infer("jsb-filter", [tensor("x", chorale)], sequence_id=9, sequence_end=True)


def test_errors_arrive_as_the_clients_exception(client, digits):
    with pytest.raises(InferenceServerException, match=r"^\[404\] Request for unknown model"):
        client.infer("nobody", [tensor("x", digits)])
    with pytest.raises(InferenceServerException, match=r"^\[404\] Request for unknown model"):
        client.get_model_metadata("mnist-iterative", "9")
    with pytest.raises(InferenceServerException, match=r"^\[400\] parameters\.steps: .*more than this model's maximum"):
        client.infer("mnist-iterative", [tensor("x", digits)], parameters={"steps": 10_000})
    with pytest.raises(InferenceServerException, match=r"^\[400\] parameters\.stepps: is not a field"):
        client.infer("mnist-iterative", [tensor("x", digits)], parameters={"stepps": 1})


def test_a_timeout_is_a_deadline(client, digits):
    reply = client.infer("mnist-iterative", [tensor("x", digits)], timeout=5_000_000, parameters={"steps": 2})
    assert reply.as_numpy("steps_used").tolist() == [2] * 4
    with pytest.raises(InferenceServerException, match=r"\[504\]"):
        client.infer("mnist-iterative", [tensor("x", digits)], timeout=1, parameters={"steps": 2})
    with pytest.raises(InferenceServerException, match="priority"):
        client.infer("mnist-iterative", [tensor("x", digits)], priority=1)


def test_statistics_count_what_was_done(client, digits):
    def now():
        (entry,) = client.get_inference_statistics("closed-form")["model_stats"]
        return entry

    x = np.zeros((3, 8), np.float32)
    client.infer("closed-form", [tensor("x", x)])
    before = now()
    client.infer("closed-form", [tensor("x", x)], parameters={"steps": 2})
    with pytest.raises(InferenceServerException):
        client.infer("closed-form", [tensor("x", x)], parameters={"steps": -1})
    after = now()
    assert after["inference_count"] - before["inference_count"] == 3
    assert after["execution_count"] > before["execution_count"]
    for name, more in (("success", 1), ("fail", 1), ("queue", 1), ("compute_input", 1), ("compute_infer", 1), ("compute_output", 1)):
        counted = [entry["inference_stats"][name] for entry in (before, after)]
        assert counted[1]["count"] - counted[0]["count"] == more
        assert counted[1]["ns"] >= counted[0]["ns"]
    assert after["last_inference"] >= before["last_inference"] > 1.7e12
    assert {entry["name"] for entry in client.get_inference_statistics()["model_stats"]} == {"closed-form", "mnist-iterative", "jsb-filter"}


def test_the_asyncio_client_encodes_reconstructs_and_filters(live, digits, chorale):
    async def session():
        async with aio.InferenceServerClient(live.address) as client:
            assert await client.is_server_ready()
            assert (await client.get_server_metadata())["name"] == "elbow"
            encoded = await client.infer("mnist-iterative", [tensor("x", digits)])
            packed = await client.infer(
                "mnist-iterative",
                [tensor("x", digits)],
                parameters={"method": "reconstruct"},
                request_compression_algorithm="gzip",
                response_compression_algorithm="deflate",
            )
            parts = []
            for frame in range(4):
                given = [tensor("x", chorale[frame : frame + 1].copy())]
                flags = {"sequence_start": frame == 0, "sequence_end": frame == 3}
                parts.append(await client.infer("jsb-filter", given, sequence_id=2**63, **flags))
            return encoded, packed, parts

    encoded, packed, parts = asyncio.run(session())
    assert encoded.as_numpy("mu").shape == (4, 64)
    assert packed.as_numpy("reconstruction").shape == (4, 784)
    assert [int(part.as_numpy("frame")[0]) for part in parts] == [0, 1, 2, 3]
