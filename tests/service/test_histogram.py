"""Histograms that sort their values late show what prometheus_client's own would show."""

import itertools
import threading

import numpy as np
import prometheus_client
import pytest

from service import telemetry

BUCKETS = (-5.0, 0.0, 0.5, 1.0, 10.0)


def both() -> tuple[prometheus_client.CollectorRegistry, prometheus_client.CollectorRegistry]:
    return prometheus_client.CollectorRegistry(), prometheus_client.CollectorRegistry()


def samples(registry: prometheus_client.CollectorRegistry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    found = (sample for family in registry.collect() for sample in family.samples if not sample.name.endswith("_created"))
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in found}


@pytest.mark.parametrize("buckets", [BUCKETS, BUCKETS[1:]])
@pytest.mark.parametrize("count", [0, 1, 7, telemetry.MOST_PENDING, 2 * telemetry.MOST_PENDING + 3])
def test_buckets_counts_and_sums_are_those_of_prometheus_client(count: int, buckets: tuple[float, ...]) -> None:
    ours, theirs = both()
    mine = telemetry.Histogram("h", "help", ("model",), buckets=buckets, registry=ours).labels("m")
    reference = prometheus_client.Histogram("h", "help", ("model",), buckets=buckets, registry=theirs).labels("m")
    values = [*BUCKETS, 1e9, *np.random.default_rng(0).normal(size=count)][:count]
    for value in values:
        mine.observe(value)
        reference.observe(value)
    shown, expected = samples(ours), samples(theirs)
    assert shown.keys() == expected.keys()
    assert all(shown[name] == pytest.approx(expected[name]) for name in expected)
    assert samples(ours) == shown  # looking changes nothing


def test_text_is_that_of_prometheus_client() -> None:
    ours, theirs = both()
    telemetry.Histogram("h", "help", buckets=BUCKETS, registry=ours).observe(0.25)
    prometheus_client.Histogram("h", "help", buckets=BUCKETS, registry=theirs).observe(0.25)
    text = [line for line in prometheus_client.generate_latest(theirs).splitlines() if b"_created" not in line]
    assert prometheus_client.generate_latest(ours).splitlines() == text


def test_no_value_is_lost_between_threads_that_observe_and_one_that_looks() -> None:
    registry = prometheus_client.CollectorRegistry()
    series = telemetry.Histogram("h", "help", ("model",), buckets=BUCKETS, registry=registry).labels("m")
    threads = [threading.Thread(target=lambda: [series.observe(1.0) for _ in range(20_000)]) for _ in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        series.read()
    counts, total = series.read()
    assert counts.sum() == total == 60_000


def test_a_label_too_few_is_an_error() -> None:
    histogram = telemetry.Histogram("h", "help", ("model",), buckets=BUCKETS, registry=prometheus_client.CollectorRegistry())
    with pytest.raises(ValueError, match="has the labels"):
        histogram.labels()


def test_no_sum_of_a_model_ever_falls() -> None:
    """Gains and losses were one histogram, whose sum fell at every loss: to `rate` a restart, and so a huge gain."""
    metrics = telemetry.Metrics()
    model = metrics.of_model("m", "1")

    def sums() -> dict[str, float]:
        shown = samples(metrics.registry)
        return {name: value for (name, _), value in shown.items() if name in ("elbow_elbo_gain_nats_sum", "elbow_elbo_loss_nats_sum")}

    seen = [sums()]
    for gain in (3.0, -5.0, 0.0, -0.5):
        model.gained(gain)
        seen.append(sums())
    for before, after in itertools.pairwise(seen):
        assert all(after[name] >= before[name] for name in before)
    assert seen[-1] == {"elbow_elbo_gain_nats_sum": 3.0, "elbow_elbo_loss_nats_sum": 5.5}
