"""Probes, metrics, request ids and the front page."""

from __future__ import annotations

import logging
import shutil
import subprocess

import pytest


def test_a_server_with_models_is_alive_and_ready(service):
    assert service.get("/livez").json() == {"live": True}
    ready = service.get("/readyz")
    assert ready.status_code == 200
    assert ready.json()["models"] == ["digits/1", "digits/2", "direct/1", "images/1", "recurrent/1"]


def test_readiness_names_the_artifacts_that_were_refused(service):
    service.app.state.server.repository.failures["bad/1"] = "weights.safetensors is missing"
    assert service.get("/readyz").json()["failed"] == {"bad/1": "weights.safetensors is missing"}


def test_a_server_without_models_or_one_that_drains_is_not_ready(serve, service):
    assert serve().get("/readyz").status_code == 503
    service.app.state.server.draining = True
    assert service.get("/readyz").status_code == 503
    assert service.get("/livez").status_code == 200


def test_metrics_count_requests_by_endpoint_model_and_code(service):
    service.post("digits/encode", {"inputs": [[0.0] * 784], "steps": 3})
    service.post("digits/encode", {})
    service.post("made-up/encode", {})
    text = service.get("/metrics").text
    assert 'elbow_requests_total{code="200",endpoint="encode",model="digits",version="2"} 1.0' in text
    assert 'elbow_requests_total{code="422",endpoint="encode",model="digits",version="2"} 1.0' in text
    assert 'elbow_requests_total{code="404",endpoint="encode",model="",version=""} 1.0' in text
    assert "made-up" not in text
    assert 'elbow_queue_wait_seconds_sum{model="digits",version="2"} 0.00025' in text
    assert 'elbow_steps_used_sum{model="digits",version="2"} 3.0' in text
    assert 'elbow_refusals_total{reason="invalid_input"} 1.0' in text


def test_a_plain_request_id_is_echoed_and_any_other_replaced(service):
    assert service.get("/livez", headers={"X-Request-ID": "trace-7"}).headers["x-request-id"] == "trace-7"
    made = service.get("/livez", headers={"X-Request-ID": "a b\tc"}).headers["x-request-id"]
    assert len(made) == 32


def test_the_front_page_names_the_models_and_links_the_docs(service):
    page = service.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "/v1/models/digits" in page.text
    assert "digits &amp; &lt;tests&gt;" in page.text
    assert 'href="/docs"' in page.text
    assert service.get("/docs").status_code == 200


@pytest.mark.parametrize(
    ("header", "trace"),
    [
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "4bf92f3577b34da6a3ce929d0e0e4736"),
        ("01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-later", "4bf92f3577b34da6a3ce929d0e0e4736"),
        ("00-00000000000000000000000000000000-00f067aa0ba902b7-01", None),
        ("ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", None),
        ("nonsense", None),
    ],
)
def test_the_log_names_the_trace_that_a_client_began(service, caplog, header, trace):
    with caplog.at_level(logging.DEBUG, logger="elbow"):
        service.get("/livez", headers={"traceparent": header})
    (line,) = [record for record in caplog.records if record.message == "request"]
    assert getattr(line, "trace_id", None) == trace


def test_promtool_finds_no_fault_in_the_metrics(service):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool (Debian's prometheus) is not installed")
    service.post("digits/encode", {"inputs": [[0.0] * 784], "steps": 3, "return": ["trace"]})
    service.post("digits/encode", {})
    text = service.get("/metrics").text
    assert "elbow_elbo_gain_nats_sum" in text
    assert "elbow_elbo_quantile_bucket" in text
    checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
