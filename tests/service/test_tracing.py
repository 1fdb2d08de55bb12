"""A span per request, in the client's trace, and none unless asked for; exported by OTLP from a live server."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.app import assemble
from service.deps import Server
from service.repository import Repository, card_sha256
from service.telemetry import LOG, Metrics
from tests.service.conftest import LIMITS, CardOnly, FakeScheduler, card
from tests.service.streams.conftest import ServerProcess, free_port

trace = pytest.importorskip("opentelemetry.sdk.trace", reason="the extra otel is not installed")
PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
BODY = {"inputs": [[0.0] * 784], "steps": 1}


@pytest.fixture
def spans() -> Iterator[Any]:
    """(exporter, provider) of spans kept in memory."""
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), trace.TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield exporter, provider
    provider.shutdown()


def calls(provider: Any, *asked: tuple[str, str, dict[str, Any]]) -> list[httpx.Response]:
    """The replies of an application that traces to `provider`."""

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        yield

    async def run() -> list[httpx.Response]:
        scheduler, metrics = FakeScheduler(), Metrics()
        repository = Repository(scheduler, lambda artifact: pytest.fail("nothing to build"))
        digits = card("digits")
        repository.add(CardOnly(digits), card_sha256(digits))  # type: ignore[arg-type]
        app = assemble(metrics, lifespan, tracer_provider=provider)
        app.state.server = Server(scheduler, repository, LIMITS, metrics)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
            return [await http.request(method, path, **options) for method, path, options in asked]

    return asyncio.run(run())


def test_a_request_is_a_span_of_the_clients_trace(spans: Any) -> None:
    exporter, provider = spans
    path = "/v1/models/digits/encode"
    reply, missing = calls(
        provider,
        ("POST", path, {"json": BODY, "headers": {"traceparent": PARENT, "X-Request-ID": "mine"}}),
        ("POST", "/v1/models/nobody/encode", {"json": BODY}),
    )
    assert (reply.status_code, missing.status_code) == (200, 404)
    first, second = exporter.get_finished_spans()
    assert f"{first.context.trace_id:032x}-{first.parent.span_id:016x}" == PARENT[3:52]
    assert first.name == "POST /v1/models/{model}/encode"
    assert first.attributes["http.response.status_code"] == 200
    assert first.attributes["elbow.request_id"] == "mine" == reply.headers["x-request-id"]
    assert second.parent is None
    assert second.attributes["http.response.status_code"] == 404


def test_probes_are_no_spans(spans: Any) -> None:
    exporter, provider = spans
    calls(provider, *(("GET", path, {}) for path in ("/livez", "/readyz", "/metrics", "/v2/health/live")))
    assert exporter.get_finished_spans() == ()


def test_log_lines_name_the_span(spans: Any, caplog: pytest.LogCaptureFixture) -> None:
    exporter, provider = spans
    with caplog.at_level("DEBUG", LOG.name):
        calls(provider, ("POST", "/v1/models/digits/encode", {"json": BODY, "headers": {"traceparent": PARENT}}))
    record = next(record for record in caplog.records if record.message == "request")
    (span,) = exporter.get_finished_spans()
    assert (record.trace_id, record.span_id) == (PARENT[3:35], f"{span.context.span_id:016x}")


class Collector(BaseHTTPRequestHandler):
    """Keeps what it is sent."""

    received: list[tuple[str, bytes]]

    def do_POST(self) -> None:
        self.received.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


def test_a_live_server_exports_where_the_variables_say(tmp_path: Path) -> None:
    pb = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    Collector.received = []
    collector = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{collector.server_port}"
    server = ServerProcess(
        tmp_path, free_port(), ELBOW_CLOSED_FORM="1", OTEL_EXPORTER_OTLP_ENDPOINT=endpoint, OTEL_SERVICE_NAME="elbow-under-test"
    )
    try:
        row = {"inputs": [[0.0] * 8], "steps": 2}
        httpx.post(f"{server.url}/v1/models/closed-form/encode", json=row, headers={"traceparent": PARENT})
    finally:
        server.stop()  # what waits for its batch leaves now
        collector.shutdown()
        collector.server_close()
    assert {path for path, _ in Collector.received} == {"/v1/traces"}  # no metrics, no logs
    resources = [resource for _, raw in Collector.received for resource in pb.ExportTraceServiceRequest.FromString(raw).resource_spans]
    assert "elbow-under-test" in json.dumps([str(resource.resource) for resource in resources])
    (span,) = [span for resource in resources for scope in resource.scope_spans for span in scope.spans]
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (PARENT[3:35], PARENT[36:52])
    assert span.name == "POST /v1/models/{model}/encode"


def test_unless_asked_for_there_is_no_span(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "elbow")  # a name is no endpoint
    with caplog.at_level("DEBUG", LOG.name):
        calls(None, ("POST", "/v1/models/digits/encode", {"json": BODY, "headers": {"traceparent": PARENT}}))
    record = next(record for record in caplog.records if record.message == "request")
    assert record.trace_id == PARENT[3:35]  # the client's, for the reader of the log
    assert not hasattr(record, "span_id")
