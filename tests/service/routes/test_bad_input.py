"""Every kind of bad input is refused with a message that names the field and the fix; the service goes on."""

from __future__ import annotations

import pytest

from service.errors import BackendFailure, DeadlineExceeded, QuotaExceeded, ShuttingDown

ROW = [0.0] * 784
POSTERIOR = {"step": 0, "levels": [{"mu": [0.0] * 4, "log_sigma": [0.0] * 4, "kl": 1.0}]}


def changed(row, index, value):
    return [*row[:index], value, *row[index + 1 :]]


def assert_problem(reply, status, code, *words):
    """The reply is a complete problem document whose detail has all of `words`."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/problem+json"
    problem = reply.json()
    assert {"type", "title", "status", "detail", "instance", "error", "code", "request_id"} <= problem.keys()
    assert (problem["status"], problem["code"], problem["error"]) == (status, code, problem["detail"])
    assert problem["request_id"] == reply.headers["x-request-id"]
    for word in words:
        assert word in problem["detail"]
    return problem


@pytest.mark.parametrize(
    ("inputs", "field", "words"),
    [
        ([], "inputs", "is empty"),
        ("abc", "inputs", 'must be a list of rows, not the string "abc"'),
        (None, "inputs", "not null"),
        ({"a": 1}, "inputs", "not an object"),
        ([ROW] * 21, "inputs", "21 rows, this server takes at most 20"),
        ([ROW, ROW[:-1]], "inputs[1]", "has 783 numbers, this model takes 784 numbers per row"),
        ([ROW, [*ROW, 0.0]], "inputs[1]", "has 785 numbers"),
        ([[]], "inputs[0]", "has 0 numbers"),
        (ROW, "inputs[0]", "for a single row send inputs: [[…]]"),
        ([[ROW]], "inputs[0][0]", "nested too deeply"),
        ([[ROW[:28]] * 28], "inputs[0][0]", "nested too deeply"),
        ([changed(ROW, 17, "0.5")], "inputs[0][17]", 'the string "0.5" is not a number'),
        ([ROW, changed(ROW, 3, None)], "inputs[1][3]", "null is not a number"),
        ([changed(ROW, 3, {})], "inputs[0][3]", "an object is not a number"),
        ([ROW, None], "inputs[1]", "null is not a row"),
        ([changed(ROW, 5, 1.5)], "inputs[0][5]", "1.5 is outside [0, 1]"),
        ([ROW, changed(ROW, 5, -0.1)], "inputs[1][5]", "-0.1 is outside [0, 1]"),
        ([changed(ROW, 5, 1e300)], "inputs[0][5]", "1e+300 is outside [0, 1]"),
        ([changed(ROW, 5, 2**70)], "inputs[0][5]", "outside [0, 1]"),
    ],
)
def test_inputs_that_do_not_fit(service, inputs, field, words):
    problem = assert_problem(service.post("digits/encode", {"inputs": inputs}), 422, "invalid_input", field, words)
    assert problem["errors"][0]["field"] == field


@pytest.mark.parametrize(
    ("inputs", "field", "words"),
    [
        ([[[0.0] * 28] * 27], "inputs[0]", "has 27 entries"),
        ([[[0.0] * 28] * 27 + [[0.0] * 27]], "inputs[0][27]", "has 27 numbers"),
        ([[[0.0] * 28] * 27 + [0.0]], "inputs[0][27]", "0.0 is not a list"),
        ([[[0.0] * 28] * 27 + [[0.0] * 27 + [2.0]]], "inputs[0][27][27]", "2 is outside"),
        ([[0.0] * 783 + [2.0]], "inputs[0][783]", "2 is outside"),
        ([[0.0] * 783], "inputs[0]", "784 numbers per row or a nest of 28 × 28"),
        ([[0.0] * 784, [[0.0] * 28] * 28], "inputs", "all be flat or all be nested"),
    ],
)
def test_nested_inputs_that_do_not_fit(service, inputs, field, words):
    problem = assert_problem(service.post("images/encode", {"inputs": inputs}), 422, "invalid_input", words)
    assert problem["errors"][0]["field"] == field


@pytest.mark.parametrize(
    ("mask", "field", "words"),
    [
        ([ROW, ROW], "mask", "one row for each of the 1 rows"),
        (1, "mask", "got 1"),
        ([ROW[:-1]], "mask[0]", "has 783 numbers"),
        ([changed(ROW, 9, 0.5)], "mask[0][9]", "0.5 is neither 0 nor 1"),
        ([changed(ROW, 9, 2)], "mask[0][9]", "2 is neither"),
        ([changed(ROW, 9, "1")], "mask[0][9]", "not a number"),
        ([None], "mask[0]", "null is not a row"),
    ],
)
def test_masks_that_do_not_fit(service, mask, field, words):
    problem = assert_problem(service.post("digits/encode", {"inputs": [ROW], "mask": mask}), 422, "invalid_input", words)
    assert problem["errors"][0]["field"] == field


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("steps", -1, "must be at least 0, not -1"),
        ("steps", 2.5, "must be a whole number, not 2.5"),
        ("steps", True, "must be a whole number, not true"),
        ("steps", -1e19, "not -1e+19"),
        ("seed", -1e19, "not -1e+19"),
        ("samples", -(2**63) - 1e5, "not -9.22337e+18"),
        ("steps", "5", 'must be a whole number, not the string "5"'),
        ("steps", 65, "65 is more than this model's maximum of 64"),
        ("steps", 10**30, "steps"),
        ("deadline_ms", 0, "greater than 0"),
        ("deadline_ms", -5, "greater than 0"),
        ("deadline_ms", "5", "must be a number"),
        ("deadline_ms", True, "must be a number"),
        ("deadline_ms", 1e9, "maximum of 10000"),
        ("tolerance", 0, "greater than 0"),
        ("tolerance", [], "must be a number, not a list"),
        ("elastic", 1, "must be true, false or null"),
        ("seed", -1, "whole number from 0"),
        ("seed", 1.5, "whole number from 0"),
        ("seed", True, "not true"),
        ("seed", 2**64, "whole number from 0"),
        ("seed", [1, 2], "has 2 entries for 1 rows"),
        ("samples", 0, "at least 1"),
        ("samples", 17, "maximum of 16"),
        ("samples", None, "must be a whole number, not null"),
        ("return", ["elbow"], "must be one of 'posterior'"),
        ("return", "elbo", "must be a list"),
        ("stepz", 5, "is not a field of this call, which takes"),
    ],
)
def test_small_fields_that_do_not_fit(service, field, value, words):
    problem = assert_problem(service.post("digits/encode", {"inputs": [ROW], field: value}), 422, "invalid_input", field, words)
    assert problem["errors"][0]["field"].startswith(field)


def test_all_offending_fields_are_listed(service):
    problem = assert_problem(service.post("digits/encode", {"steps": -1, "extra": 1}), 422, "invalid_input")
    assert {error["field"] for error in problem["errors"]} == {"inputs", "steps", "extra"}


@pytest.mark.parametrize(
    ("posterior", "field", "words"),
    [
        ([], "posterior", "is empty"),
        ([POSTERIOR, POSTERIOR], "posterior", "2 entries for 1 rows"),
        ([3], "posterior[0]", "must be an object"),
        ([{"levels": POSTERIOR["levels"]}], "posterior[0].step", "is required"),
        ([POSTERIOR | {"step": 1.5}], "posterior[0].step", "whole number"),
        ([POSTERIOR | {"step": -1}], "posterior[0].step", "from 0 to 1048511"),
        ([POSTERIOR | {"step": 1_048_512}], "posterior[0].step", "from 0 to 1048511"),  # noise is left for 64 steps after the last one
        ([POSTERIOR | {"sigma": 1}], "posterior[0].sigma", "not part of a posterior"),
        ([POSTERIOR | {"levels": []}], "posterior[0].levels", "must be a list of 1"),
        ([POSTERIOR | {"levels": [{"mu": [0.0] * 4}]}], "posterior[0].levels[0].log_sigma", "is required"),
        ([POSTERIOR | {"levels": [{"mu": [0.0] * 3, "log_sigma": [0.0] * 4}]}], "posterior[0].levels[0].mu", "has 3 numbers"),
        (
            [POSTERIOR | {"levels": [{"mu": [0, 0, True, 0], "log_sigma": [0.0] * 4}]}],
            "posterior[0].levels[0].mu[2]",
            "true is not a number",
        ),
        ([POSTERIOR | {"levels": [POSTERIOR["levels"][0] | {"kl": "1"}]}], "posterior[0].levels[0].kl", "number or null"),
        ([POSTERIOR | {"carry": {}}], "posterior[0].carry", "must be a string"),
        ([POSTERIOR | {"levels": [{"mu": [0, 0, "a", 0], "log_sigma": [0.0] * 4}]}], "posterior[0].levels[0].mu[2]", "not a number"),
        ([POSTERIOR | {"levels": [{"mu": [0.0] * 4, "log_sigma": [0, 1e39, 0, 0]}]}], "posterior[0].levels[0].log_sigma[1]", "not finite"),
    ],
)
def test_posteriors_that_do_not_fit(service, posterior, field, words):
    reply = service.post("digits/refine", {"inputs": [ROW], "posterior": posterior})
    assert assert_problem(reply, 422, "invalid_input", words)["errors"][0]["field"] == field


def test_a_recurrent_model_is_not_refined_without_or_with_a_foreign_carry(service):
    def refine(posterior):
        return service.post("recurrent/refine", {"inputs": [ROW], "posterior": [posterior]})

    assert_problem(refine(POSTERIOR), 422, "invalid_input", "keeps hidden between steps", "the whole posterior of a reply")
    first = service.post("recurrent/encode", {"inputs": [ROW], "return": ["carry"]}).json()["results"][0]["posterior"]
    assert_problem(refine(first | {"carry": first["carry"][:-4]}), 422, "invalid_input", "posterior[0].carry", "characters")
    assert_problem(refine(first | {"carry": "!" * len(first["carry"])}), 422, "invalid_input", "base64")
    assert_problem(refine(first | {"carry": 5}), 422, "invalid_input", "must be a string")


@pytest.mark.parametrize(
    ("call", "body", "field"),
    [
        ("reconstruct", {}, "inputs"),
        ("reconstruct", {"inputs": [ROW], "posterior": [POSTERIOR]}, "inputs"),
        ("reconstruct", {"posterior": [POSTERIOR], "steps": 3}, "steps"),
        ("reconstruct", {"inputs": [ROW], "samples": 17}, "samples"),
        ("score", {"inputs": [ROW], "samples": 5001}, "samples"),
        ("score", {"inputs": [ROW], "return": ["elbo"]}, "return"),
        ("generate", {"count": 0}, "count"),
        ("generate", {"count": 21}, "count"),
        ("generate", {"between": [POSTERIOR]}, "between"),
        ("generate", {"between": [POSTERIOR, {"step": 0, "levels": [{"mu": [0.0], "log_sigma": [0.0]}]}]}, "between[1].levels[0].mu"),
        ("generate", {"seed": [1]}, "seed"),
    ],
)
def test_bodies_of_the_other_calls_that_do_not_fit(service, call, body, field):
    assert assert_problem(service.post(f"digits/{call}", body), 422, "invalid_input")["errors"][0]["field"] == field


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "the body is empty"),
        (b"{", "the body is not JSON"),
        (b'{"inputs": [[1,]]}', "line 1 column"),
        (b"\xff\xfe", "the body is not JSON"),
        (b'{"inputs": [[0.0, 0.5], [0.0, NaN]]}', "inputs[1][1]: NaN is not a JSON number"),
        (b'{"inputs": [[Infinity]]}', "inputs[0][0]: an infinite number is not a JSON number"),
        (b'{"inputs": [[0, 1e999]]}', "inputs[0][1]: an infinite number"),
        (b'{"tolerance": -Infinity}', "tolerance: an infinite number"),
        (b'{"inputs": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nested too deeply"),
        (b"[" * 500_000, "nested too deeply"),
    ],
)
def test_bodies_that_are_not_json(service, raw, words):
    assert_problem(service.post("digits/encode", content=raw), 400, "malformed_body", words)


def test_json_nested_deeply_but_legally_is_refused_as_a_row(service):
    raw = b'{"inputs": ' + b"[" * 900 + b"]" * 900 + b"}"
    assert_problem(service.post("digits/encode", content=raw), 422, "invalid_input", "inputs[0][0]", "nested too deeply")


@pytest.mark.parametrize("raw", [b"[]", b'"a"', b"3", b"null"])
def test_json_that_is_not_an_object(service, raw):
    assert_problem(service.post("digits/encode", content=raw), 422, "invalid_input", "must be a JSON object")


def test_a_body_over_the_limit_is_refused_by_its_announced_length(service):
    assert_problem(service.post("digits/encode", content=b" " * (2**20 + 1)), 413, "body_too_large", "1048576 bytes")


def test_a_body_over_the_limit_is_refused_while_it_streams_in(service):
    sent = 0

    async def chunks():
        nonlocal sent
        for _ in range(1000):
            sent += 2**16
            yield b" " * 2**16

    reply = service.post("digits/encode", content=chunks())
    assert_problem(reply, 413, "body_too_large")
    assert sent < 2**21


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"Content-Type": "text/plain"}, "content type 'text/plain' is not read here: send Content-Type: application/json"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, "application/json"),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, "content encoding 'gzip'"),
    ],
)
def test_content_types_and_encodings_that_are_not_read(service, headers, words):
    assert_problem(service.post("digits/encode", content=b"{}", headers=headers), 415, "unsupported_media", words)


@pytest.mark.parametrize("query", ["steps=1", "columns=mu", "foo"])
def test_what_is_in_the_query_of_a_json_call_is_not_overlooked(service, query):
    name = query.partition("=")[0]
    reply = service.post(f"digits/encode?{query}=" if "=" not in query else f"digits/encode?{query}", {"inputs": [ROW]})
    assert_problem(reply, 422, "invalid_input", f"{name}: is in the query")


def test_an_unknown_model_or_version_lists_what_there_is(service):
    reply = service.post("nobody/encode", {"inputs": [ROW]})
    assert_problem(reply, 404, "unknown_model", "no model 'nobody'", "digits", "recurrent")
    reply = service.post("digits/versions/9/encode", {"inputs": [ROW]})
    assert_problem(reply, 404, "unknown_model", "no version '9': loaded are 1, 2")
    assert_problem(service.get("/v1/models/nobody/curve"), 404, "unknown_model")


def test_an_unknown_path_points_to_the_docs(service):
    assert_problem(service.get("/v1/nothing"), 404, "not_found", "/docs")
    assert_problem(service.post("digits/encodes", {}), 404, "not_found")


def test_a_wrong_method_names_the_right_one(service):
    reply = service.get("/v1/models/digits/encode")
    assert_problem(reply, 405, "method_not_allowed", "use POST")
    assert reply.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("fault", "status", "retry_after"),
    [
        (ShuttingDown("draining", retry_after_s=0.2), 503, "1"),
        (QuotaExceeded("slow down", retry_after_s=3.5), 429, "4"),
        (DeadlineExceeded("20 ms are too few"), 504, None),
        (BackendFailure("the engine failed"), 500, None),
    ],
)
def test_what_the_scheduler_refuses_reaches_the_client(service, fault, status, retry_after):
    service.scheduler.fault = fault
    reply = service.post("digits/encode", {"inputs": [ROW]})
    problem = assert_problem(reply, status, fault.code, fault.detail)
    assert reply.headers.get("retry-after") == retry_after
    assert problem.get("retry_after_s") == getattr(fault, "retry_after_s", None)
    assert f'elbow_refusals_total{{reason="{fault.code}"}} 1.0' in service.get("/metrics").text


def test_an_unforeseen_failure_is_a_plain_500_that_leaks_nothing(service, caplog):
    service.scheduler.fault = ZeroDivisionError("secret")
    reply = service.post("digits/encode", {"inputs": [ROW]}, headers={"X-Request-ID": "abc-1"})
    problem = assert_problem(reply, 500, "internal", "abc-1")
    assert "secret" not in str(problem)
    assert "secret" in caplog.text
