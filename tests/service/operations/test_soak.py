"""benchmarks/soak.py in small: with every kind of fault the counts add up, it goes on after Ctrl-C, and it would notice a miscount."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import soak

    yield soak
    for name in ("soak", "_soak_load", "_served", "_report"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_a_short_soak_adds_up_and_goes_on_after_ctrl_c(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--state", str(tmp_path / "soak")]
    command += ["--requests", "1200", "--cycles", "60", "--fail-every", "40"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ELBOW_")} | {"PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    state = tmp_path / "soak" / "state.json"
    until = time.monotonic() + 120
    while not (state.exists() and len(json.loads(state.read_text())["legs"]) >= 2):
        assert time.monotonic() < until
        time.sleep(0.2)
    first.send_signal(signal.SIGINT)
    assert first.communicate(timeout=60)[0].strip().endswith("(the server runs on for 15 minutes)")
    assert first.returncode == 130
    second = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    kept = json.loads((tmp_path / "soak" / "soak.json").read_text())
    assert [leg["wrong"] for leg in kept["legs"]] == [[] for _ in kept["legs"]], second.stdout
    assert kept["servers"] == 1
    assert sum(leg["done"] for leg in kept["legs"]) >= 1200
    assert sum(leg["cycles"] for leg in kept["legs"]) == 60
    assert sum(leg["codes"].get("backend_failure", 0) for leg in kept["legs"]) > 0


def leg(**changes: Any) -> dict[str, Any]:
    quiet: dict[str, Any] = {"seen": {"200": 10}, "codes": {}, "slow": {}, "left": {}, "cycles": 1, "frames": 4, "frames_sent": 0}
    return quiet | {"streams": {"closed": 1}, "odd": []} | changes


AFTER = {
    'elbow_requests_total{code="200",endpoint="encode",model="m",version="1"}': 10.0,
    'elbow_scheduler_jobs_done_total{model="m",version="1"}': 10.0,
    'elbow_stream_frames_total{model="f",version="1"}': 4.0,
    'elbow_rows_in_flight{model="m",version="1"}': 0.0,
}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, None),
        ({next(iter(AFTER)): 11.0}, "encode answered 200"),
        ({'elbow_requests_total{code="500",endpoint="encode",model="m",version="1"}': 1.0}, "encode answered 500"),
        ({'elbow_scheduler_jobs_done_total{model="m",version="1"}': 12.0}, "jobs done"),
        ({'elbow_stream_frames_total{model="f",version="1"}': 9.0}, "frames"),
        ({'elbow_rows_in_flight{model="m",version="1"}': 1.0}, "elbow_rows_in_flight"),
    ],
)
def test_a_count_that_is_off_is_named(soak: Any, changed: dict[str, float], said: str | None) -> None:
    wrong = soak.disagreements(leg(), Counter(), Counter({**AFTER, **changed}))
    assert (wrong == []) if said is None else wrong[0].startswith(said)


def test_a_stream_that_was_lost_is_named(soak: Any) -> None:
    lost = leg(streams={"closed": 1, "lost: TimeoutError": 2})
    assert soak.disagreements(lost, Counter(), Counter(AFTER)) == ["2 streams: lost: TimeoutError"]


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ({"resident_mb": 204.0, "descriptors": 15}, None),
        ({"resident_mb": 206.0, "descriptors": 15}, "memory grew by 6.0 MB"),
        ({"resident_mb": 200.0, "descriptors": 16}, "descriptors went from 15 to 16"),
    ],
)
def test_memory_and_descriptors_are_held_to_those_at_a_tenth(soak: Any, last: dict[str, Any], said: str | None) -> None:
    common = {"done": 50, "pid": 1, "wrong": [], "seen": {}, "codes": {"backend_failure": 1}}
    legs = [common | {"resident_mb": 150.0, "descriptors": 40}, common | {"resident_mb": 200.0, "descriptors": 15}]
    legs += [legs[-1]] * 17 + [common | last]
    wrong = soak.verdict({"legs": legs, "servers": 1})
    assert (wrong == []) if said is None else wrong[0].startswith(said)
