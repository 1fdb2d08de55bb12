"""benchmarks/train.py at tiny sizes: the two sides of every row are the same update, timed in processes of their own."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module; its graphs run as they stand, for the compiler takes half a minute each."""
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("train")


PUBLISHED = ("mnist", "jsb-avf5", "jsb-avf5-bf16")
ALSO = [pytest.param(name, marks=pytest.mark.slow) for name in ("mnist-bf16", "jsb-avf1", "jsb-avf1-bf16")]


@pytest.mark.parametrize("name", [*PUBLISHED, *ALSO])
def test_the_two_sides_of_a_row_are_the_same_update(benchmark: ModuleType, name: str) -> None:
    assert benchmark.difference_of_sides(name, torch.device("cpu"), tiny=True) > 0
    assert name in benchmark.CASES


@pytest.mark.slow  # each contender imports torch in a process of its own
def test_the_table_has_a_row_for_every_update_asked_for(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    names = ["mnist", "jsb-avf5"]
    monkeypatch.setattr(
        sys, "argv", ["train.py", "--tiny", "--cases", *names, "--threads", "1", "--seconds", "0", "--rounds", "1", "--keep", ""]
    )
    benchmark.main()
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in names)
    assert "kept in" not in printed


def test_nothing_is_timed_if_the_gradients_differ(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = benchmark.plain_static_update
    monkeypatch.setattr(benchmark, "plain_static_update", lambda model, x, noise: plain(model, 0.99 * x, noise))
    with pytest.raises(SystemExit, match="not the same update"):
        benchmark.difference_of_sides("mnist", torch.device("cpu"), tiny=True)
