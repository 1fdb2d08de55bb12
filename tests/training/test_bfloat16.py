"""A run that asks for bfloat16 gets float32 where that is far quicker, and says so; who insists is heard."""

from __future__ import annotations

from dataclasses import replace

import pytest

from training import bfloat16
from training.bfloat16 import SLOW, suited, times_float32
from training.config import RunConfig


@pytest.fixture
def run(tiny_run: RunConfig) -> RunConfig:
    return replace(tiny_run, precision="bf16-mixed")


@pytest.mark.parametrize(("times", "precision"), [(60.0, "32-true"), (SLOW, "32-true"), (1.0, "bf16-mixed")])
def test_bfloat16_is_left_where_it_is_slow(
    run: RunConfig, times: float, precision: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bfloat16, "times_float32", lambda: times)
    assert suited(run, "cpu") == replace(run, precision=precision)
    assert ("--precision bf16-mixed insists" in capsys.readouterr().err) == (precision == "32-true")


def test_other_devices_and_runs_in_float32_are_not_asked_about(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16, "times_float32", lambda: pytest.fail("measured"))
    assert suited(run, "cuda") is run
    plain = replace(run, precision="32-true")
    assert suited(plain, "cpu") is plain


def test_what_is_measured_is_the_ratio_of_the_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([0, 1, 0, 2, 0, 9, 0, 7, 0, 120, 0, 500])  # begin and end of three products in float32, then in bfloat16
    monkeypatch.setattr(bfloat16.time, "perf_counter", lambda: next(readings))
    assert times_float32(size=4) == 60
    assert list(readings) == []
