"""OpenTelemetry: a span per request and per WebSocket, in the trace that the client's `traceparent` names. Nothing leaves unless asked for.

The spans are the framework's own (FastAPI 0.143 and later). They are exported where the extra `otel` is installed and
OTEL_EXPORTER_OTLP_ENDPOINT, or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, says where to. Metrics are Prometheus's, logs go to standard error.
"""

from __future__ import annotations

from typing import Any

from starlette.types import Scope

from service.access import OPEN_PATHS

TELEMETRY = "fastapi.telemetry"
"""Where FastAPI keeps a request's span, if anything listens."""


def telemetry(tracer_provider: Any = None) -> dict[str, Any]:
    """FastAPI's `telemetry` argument. `tracer_provider`: where spans go besides or instead of the endpoint; None: the process's own."""
    return {
        "auto_configure": True,
        "tracer_provider": tracer_provider,
        "metrics": False,
        "logs": False,
        "operation_spans": False,
        "exclude": _is_probe,
    }


def span_of(scope: Scope) -> Any:
    """The request's span; None where nobody listens."""
    return getattr(scope.get(TELEMETRY), "span", None)


def _is_probe(scope: Any) -> bool:
    return scope["path"] in OPEN_PATHS
