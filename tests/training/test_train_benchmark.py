"""benchmarks/train.py at tiny sizes: the two sides of every row are the same update, and the table is printed."""

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


def test_the_table_has_a_row_for_every_update(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--tiny", "--threads", "1", "--seconds", "0", "--keep", ""])
    benchmark.main()
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in benchmark.CASES)
    assert "kept in" not in printed


def test_nothing_is_timed_if_the_gradients_differ(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = benchmark.plain_static_update
    monkeypatch.setattr(benchmark, "plain_static_update", lambda model, x, noise: plain(model, 0.99 * x, noise))
    with pytest.raises(SystemExit, match="not the same update"):
        benchmark.prepare("mnist", torch.device("cpu"), [1], tiny=True)
