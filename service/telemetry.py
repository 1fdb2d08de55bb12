"""What the service says about itself: structured log lines and Prometheus metrics. Base units: seconds, rows, nats."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

METRICS_CONTENT_TYPE = CONTENT_TYPE_LATEST
LOG = logging.getLogger("elbow")
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
"""Of the request or WebSocket in whose context the code runs; what is handed to an engine thread carries it along as a value."""
MOST_NAMED = 8
"""Request ids in one log line: enough to find the others, and short also where a batch had hundreds."""

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_STEP_SECONDS = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
_COUNTS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)
_QUANTILES = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)
_GAIN_NATS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, message and whatever was passed as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{key: value for key, value in vars(record).items() if key not in _STANDARD},
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


def configure_logging(level: str) -> None:
    """Sends every log line of the process to standard error, as JSON. Called by the entry point only."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # it logs every WebSocket with its query, in which a state token may stand
    logging.getLogger("uvicorn.error").addFilter(lambda record: "WebSocket" not in record.getMessage())


def named(request_ids: Iterable[str]) -> list[str]:
    """The first few, each once, without those that have none (jobs of tools and tests)."""
    return [one for one in dict.fromkeys(request_ids) if one][:MOST_NAMED]


MOST_PENDING = 4096
"""Values that may wait for the next look: 32 KB or so per series."""


class Histogram(Collector):
    """A drop-in for `prometheus_client.Histogram` that costs its callers one append: `labels(*values)` gives the series to `observe` on.

    prometheus_client's own takes a lock and walks its buckets at every value; with seven values a request that was a tenth of what
    the surface cost. Here values are sorted into buckets many at a time, and when someone looks.
    """

    def __init__(
        self, name: str, documentation: str, labelnames: Sequence[str] = (), *, buckets: Sequence[float], registry: CollectorRegistry
    ):
        self._name, self._documentation, self._labelnames = name, documentation, tuple(labelnames)
        self._bounds = np.array([*(bound for bound in buckets if np.isfinite(bound)), np.inf])
        self._shown = [*(str(float(bound)) for bound in self._bounds[:-1]), "+Inf"]
        self._series: dict[tuple[str, ...], Series] = {}
        if not self._labelnames:
            self.labels()  # shown as empty until there is something
        registry.register(self)

    def observe(self, value: float) -> None:
        """Of a histogram without labels."""
        self.labels().observe(value)

    def labels(self, *values: object) -> Series:
        """The series of these label values, made when it is first asked for.

        Raises:
            ValueError: not one value per label name.
        """
        if len(values) != len(self._labelnames):
            raise ValueError(f"{self._name}: has the labels {self._labelnames}, got {values}")
        key = tuple(map(str, values))
        found = self._series.get(key)
        return self._series.setdefault(key, Series(self._bounds)) if found is None else found

    def collect(self) -> Iterator[Metric]:
        family = Metric(self._name, self._documentation, "histogram")
        for key, series in list(self._series.items()):
            labels = dict(zip(self._labelnames, key, strict=True))
            counts, total = series.read()
            below = np.cumsum(counts).tolist()
            for bound, count in zip(self._shown, below, strict=True):
                family.add_sample(f"{self._name}_bucket", {**labels, "le": bound}, count)
            family.add_sample(f"{self._name}_count", labels, below[-1])
            if self._bounds[0] >= 0:  # a sum of values of either sign is no counter
                family.add_sample(f"{self._name}_sum", labels, total)
        yield family


class Series:
    """The values of one set of labels. Any thread may `observe`."""

    __slots__ = ("_bounds", "_counts", "_lock", "_pending", "_sum")

    def __init__(self, bounds: NDArray[np.float64]):
        self._bounds, self._counts, self._sum = bounds, np.zeros(len(bounds), np.int64), 0.0
        self._pending: list[float] = []
        self._lock = threading.Lock()

    def observe(self, value: float) -> None:
        self._pending.append(value)
        if len(self._pending) >= MOST_PENDING:
            self.read()

    def read(self) -> tuple[NDArray[np.int64], float]:
        """How many values lie in each bucket (at most its bound, above the one before), and their sum."""
        with self._lock:
            many = len(self._pending)  # others may append meanwhile: those stay for the next time
            values = np.array(self._pending[:many], np.float64)
            del self._pending[:many]
            if many:
                places = np.searchsorted(self._bounds, values, side="left").clip(max=len(self._bounds) - 1)
                self._counts += np.bincount(places, minlength=len(self._bounds))
                self._sum += float(values.sum())
            return self._counts.copy(), self._sum


@dataclass(slots=True)
class Call:
    """What is known of the request in hand; routes fill it in, the middleware reports it.

    `model` and `version` stay empty until they are known to exist, so that no client can invent label values.
    `problem`: code of the problem it met. `ended`: status of the problem that ended a stream (WebSocket or events) whose head had gone.
    """

    request_id: str
    endpoint: str = "other"
    model: str = ""
    version: str = ""
    problem: str = ""
    ended: int = 0


@dataclass(frozen=True, slots=True)
class ModelMetrics:
    """What is observed of each request to one version of a model; the labels are looked up once, not per request."""

    queue_wait: Series
    step_duration: Series
    batch_rows: Series
    steps_used: Series
    negative_elbo: Series
    elbo_gain: Series
    elbo_loss: Series
    elbo_quantile: Series
    deadline_missed: Counter
    rows_in_flight: Gauge

    def gained(self, nats: float) -> None:
        """What steps were worth, of either sign."""
        (self.elbo_gain if nats >= 0 else self.elbo_loss).observe(abs(nats))


_COUNTED = {
    "ticks": "Ticks of the scheduler.",
    "steps": "Refinement steps of single rows.",
    "rows_done": "Rows finished.",
    "jobs_done": "Requests answered by the scheduler.",
    "jobs_failed": "Requests the scheduler answered with an error.",
    "jobs_abandoned": "Requests whose client left first.",
    "degraded": "Rows given fewer steps than asked, under load.",
}
_HELD = {"rows_waiting": "Rows in line for a slot.", "rows_in_flight": "Rows in refinement."}


class _Scheduled(Collector):
    """Reads the scheduler's own counts when Prometheus comes to collect them."""

    def __init__(self, counts: Callable[[], Mapping[str, Any]]):
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        for kinds, family in ((_COUNTED, CounterMetricFamily), (_HELD, GaugeMetricFamily)):
            for attribute, text in kinds.items():
                metric = family(f"elbow_scheduler_{attribute}", text, labels=("model", "version"))
                for key, counts in self._counts().items():
                    metric.add_metric(key.split("/", 1), getattr(counts, attribute))
                yield metric


_STREAM_COUNTED = {
    "frames": "Frames filtered.",
    "steps": "Refinement steps of frames.",
    "degraded": "Frames of elastic streams given fewer steps than asked, because they lagged.",
    "nonfinite": "Frames whose result was not finite; the stream kept its last finite state.",
}


class _Streamed(Collector):
    """Reads the stream lanes' own counts when Prometheus comes to collect them."""

    def __init__(self, counts: Callable[[], Mapping[str, Any]]):
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        live = GaugeMetricFamily("elbow_streams_live", "Streams that are open.", labels=("model", "version"))
        counted = {
            name: CounterMetricFamily(f"elbow_stream_{name}", text, labels=("model", "version")) for name, text in _STREAM_COUNTED.items()
        }
        for key, (count, counts) in self._counts().items():
            live.add_metric(key.split("/", 1), count)
            for name, metric in counted.items():
                metric.add_metric(key.split("/", 1), getattr(counts, name))
        yield from (live, *counted.values())


class Metrics:
    """The counters and histograms of one application, on a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        call, model = ("endpoint", "model", "version"), ("model", "version")
        self.requests = Counter("elbow_requests_total", "Requests answered, and WebSockets ended.", (*call, "code"), registry=self.registry)
        self.request_duration = Histogram(
            "elbow_request_duration_seconds", "From request head to last byte of the reply.", call, buckets=_SECONDS, registry=self.registry
        )
        self.refusals = Counter("elbow_refusals_total", "Requests refused or failed, by problem code.", ("reason",), registry=self.registry)
        self.queue_wait = Histogram(
            "elbow_queue_wait_seconds", "From admission to the first batch.", model, buckets=_SECONDS, registry=self.registry
        )
        self.step_duration = Histogram(
            "elbow_step_duration_seconds",
            "Compute time of a request over its refinement steps (one more for the start and the measuring).",
            model,
            buckets=_STEP_SECONDS,
            registry=self.registry,
        )
        self.batch_rows = Histogram(
            "elbow_batch_rows", "Rows sharing the last batch of a request.", model, buckets=_COUNTS[1:], registry=self.registry
        )
        self.steps_used = Histogram("elbow_steps_used", "Refinement steps done for a row.", model, buckets=_COUNTS, registry=self.registry)
        self.negative_elbo = Histogram(
            "elbow_negative_elbo_nats",
            "Minus the ELBO of answered rows, in nats per row.",
            model,
            buckets=(-1000, -100, 0, 25, 50, 75, 100, 125, 150, 200, 300, 500, 1000, 10000),
            registry=self.registry,
        )
        self.elbo_gain = Histogram(
            "elbow_elbo_gain_nats",
            "What the steps of a row were worth: its ELBO at the end less that before the first step, if both were measured and it rose.",
            model,
            buckets=_GAIN_NATS,
            registry=self.registry,
        )
        self.elbo_loss = Histogram(
            "elbow_elbo_loss_nats",
            "What the steps of a row cost where its ELBO fell: apart from the gains, because a sum of both would fall, as no counter may.",
            model,
            buckets=_GAIN_NATS,
            registry=self.registry,
        )
        self.elbo_quantile = Histogram(
            "elbow_elbo_quantile",
            "Where a row's (or frame's) ELBO lies among the card's reference rows after as many steps. Uniform unless inputs drift.",
            model,
            buckets=_QUANTILES,
            registry=self.registry,
        )
        self.deadline_missed = Counter(
            "elbow_deadline_missed_total", "Requests that were admitted, yet answered after their deadline.", model, registry=self.registry
        )
        self.rows_in_flight = Gauge("elbow_rows_in_flight", "Rows admitted and not yet answered.", model, registry=self.registry)
        self.stream_lag = Histogram(
            "elbow_stream_lag_seconds", "From a message of a stream to its last frame's result.", buckets=_SECONDS, registry=self.registry
        )
        self.tokens_issued = Counter("elbow_state_tokens_issued_total", "State tokens given to clients.", registry=self.registry)
        self.browser_tokens_issued = Counter(
            "elbow_browser_tokens_issued_total", "Short-lived tokens given for browsers' WebSockets.", registry=self.registry
        )
        self.key_requests = Counter("elbow_key_requests_total", "Requests by the name of the API key.", ("key",), registry=self.registry)
        self.key_work = Counter(
            "elbow_key_row_steps_total", "Row-steps charged to the API key of that name.", ("key",), registry=self.registry
        )
        self.ready = Gauge("elbow_ready", "1 while /readyz says so.", registry=self.registry)
        self.connections = Gauge("elbow_connections", "Open HTTP connections.", registry=self.registry)
        self.artifacts_refused = Gauge("elbow_artifacts_refused", "Artifacts that could not be loaded.", registry=self.registry)
        self.model_loads = Counter(
            "elbow_model_loads_total", "Versions that were loaded, refused or unloaded.", ("outcome",), registry=self.registry
        )
        self.models_loaded = Gauge("elbow_models_loaded", "Model versions being served.", registry=self.registry)

        self._keys: dict[str, Counter] = {}
        self._key_work: dict[str, Counter] = {}
        self._models: dict[tuple[str, str], ModelMetrics] = {}
        self._answers: dict[tuple[str, str, str, int], tuple[Counter, Series]] = {}

    def watch(self, counts: Callable[[], Mapping[str, Any]]) -> None:
        """Also exposes what a scheduler counts: `counts` gives, per "name/version", an object with the attributes of `_COUNTED`."""
        self.registry.register(_Scheduled(counts))

    def watch_streams(self, counts: Callable[[], Mapping[str, Any]]) -> None:
        """Also exposes the streams: `counts` gives, per "name/version", how many are live and an object with `_STREAM_COUNTED`."""
        self.registry.register(_Streamed(counts))

    def watch_engine_process(self, pid: int) -> None:
        """Also exposes what the engine process takes, as elbow_engine_process_…: memory, processor time, descriptors."""
        ProcessCollector(namespace="elbow_engine", pid=lambda: pid, registry=self.registry)

    def of_model(self, name: str, version: str) -> ModelMetrics:
        found = self._models.get((name, version))
        if found is None:
            names = ModelMetrics.__dataclass_fields__
            found = self._models[name, version] = ModelMetrics(*(getattr(self, metric).labels(name, version) for metric in names))
        return found

    def of_key(self, name: str) -> Counter:
        """Counts the requests of a key."""
        found = self._keys.get(name)
        if found is None:
            found = self._keys[name] = self.key_requests.labels(name)
        return found

    def of_key_work(self, name: str) -> Counter:
        """Counts the row-steps charged to a key, those included that are given back later: it asked for them."""
        found = self._key_work.get(name)
        if found is None:
            found = self._key_work[name] = self.key_work.labels(name)
        return found

    def refused(self, code: str, call: Call | None, *, ended: int = 0) -> None:
        """A request met the problem `code`; None where there is no request yet. `ended`: as in Call."""
        self.refusals.labels(code).inc()
        if call is not None:
            call.problem, call.ended = code, ended

    def closed(self, call: Call, status: int) -> None:
        """One WebSocket ended. It lasts as long as its client likes: that is no duration of ours."""
        self.requests.labels(call.endpoint, call.model, call.version, str(status)).inc()

    def answered(self, call: Call, status: int, seconds: float) -> None:
        """One request left, with this status."""
        key = (call.endpoint, call.model, call.version, status)
        found = self._answers.get(key)
        if found is None:
            found = self._answers[key] = (self.requests.labels(*key[:3], str(status)), self.request_duration.labels(*key[:3]))
        found[0].inc()
        found[1].observe(seconds)

    def render(self) -> bytes:
        return generate_latest(self.registry)
