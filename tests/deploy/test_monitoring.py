"""A real Prometheus scrapes a real server by our rules, and every query of the dashboard and the rules runs on what it found.

`pytest -m slow tests/deploy/test_monitoring.py`; needs `prometheus` (apt-get install prometheus) and takes half a minute.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

from service.stream_client import FilterStream

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/elbow.json").read_text())
SILENT = {"API key", "Deadlines missed", "Refusals", "Processor"}
"""Panels that may be empty here: nobody shows a key, misses a deadline or is refused."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server of the shipped models."""
    port = a_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ELBOW_")}
    environment |= {"ELBOW_PORT": str(port), "ELBOW_REPOSITORY": str(ROOT / "checkpoints"), "ELBOW_LOG_LEVEL": "error"}
    process = subprocess.Popen([sys.executable, "-m", "service", "run"], env=environment, cwd=ROOT)
    try:
        until(lambda: httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200, 60)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def prometheus(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a Prometheus with our configuration; only the intervals are shorter and the target is `server`."""
    if shutil.which("prometheus") is None:
        pytest.skip("needs prometheus: apt-get install prometheus")
    folder, port = tmp_path_factory.mktemp("prometheus"), a_port()
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(DEPLOY / "prometheus/rules/*.yml")]
    (job,) = config["scrape_configs"]
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": [server.removeprefix("http://")]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    flags = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data", f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(["prometheus", *flags], stderr=log)
    try:
        until(lambda: httpx.get(f"http://127.0.0.1:{port}/-/ready").status_code == 200, 60)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def scraped(server: str, prometheus: str) -> str:
    """The Prometheus, when it has seen requests and a stream come, by its rules too: a rate takes two scrapes."""
    until(lambda: value(prometheus, 'sum(up{job="elbow"})') == 1, 30)

    def seen() -> bool:
        traffic(server)
        return min(value(prometheus, f"sum({rate})") for rate in ("elbow:requests:rate5m", "rate(elbow_stream_frames_total[1m])")) > 0

    until(seen, 60)
    return prometheus


def test_the_server_is_found_and_its_metrics_are_read(scraped: str) -> None:
    (target,) = httpx.get(f"{scraped}/api/v1/targets").json()["data"]["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")


def test_every_rule_evaluates_and_no_alert_fires(scraped: str) -> None:
    rules = [rule for group in httpx.get(f"{scraped}/api/v1/rules").json()["data"]["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}
    assert [rule["name"] for rule in rules if rule.get("state") == "firing"] == []


@pytest.mark.parametrize("panel", [panel for panel in DASHBOARD["panels"] if "targets" in panel], ids=lambda panel: panel["title"])
def test_every_panel_shows_something(scraped: str, panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        expression = target["expr"]
        for name, text in (("$__rate_interval", "1m"), ("$instance", ".*"), ("$model", ".*")):
            expression = expression.replace(name, text)
        found = query(scraped, expression)
        assert found or any(word in panel["title"] for word in SILENT), expression


def traffic(server: str) -> None:
    digits = (np.load(ROOT / "tests/data/mnist_sample.npz")["valid"][:4].reshape(4, -1) / 255).tolist()
    for steps in (0, 2, 8):
        body = {"inputs": digits, "steps": steps, "return": ["elbo", "trace"]}
        httpx.post(f"{server}/v1/models/mnist-iterative/encode", json=body, timeout=30).raise_for_status()

    async def listen() -> None:
        async for _ in FilterStream(server, "speech-filter", sorted((ROOT / "tests/data/digits").glob("*.wav"))[0]):
            pass

    asyncio.run(listen())


def query(prometheus: str, expression: str) -> list[Any]:
    answer = httpx.get(f"{prometheus}/api/v1/query", params={"query": expression}).json()
    assert answer["status"] == "success", answer
    result: list[Any] = answer["data"]["result"]
    return result


def value(prometheus: str, expression: str) -> float:
    found = query(prometheus, expression)
    return float(found[0]["value"][1]) if found else 0.0


def until(true: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            if true():
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.2)


def a_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
