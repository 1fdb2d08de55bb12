"""The command line: train, evaluate and export a tiny run, and one line for every error a user can act on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from models.catalogue import build
from training import runs
from training.__main__ import main
from training.checkpoint import save_weights
from training.config import RunConfig


@pytest.fixture
def tiny(tiny_run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    run = replace(tiny_run, epochs=1)
    monkeypatch.setitem(runs.RUNS, "tiny", lambda: run)
    return run


def test_train_makes_a_run_and_the_seed_can_be_chosen(tiny: RunConfig, tmp_path: Path) -> None:
    assert main(["train", "tiny", "--output", str(tmp_path), "--seed", "3"]) == 0
    assert json.loads((tmp_path / "run.json").read_text())["run"]["seed"] == 3
    assert (tmp_path / "final" / "weights.safetensors").exists()


@pytest.mark.parametrize(("given", "precision"), [([], "32-true"), (["--precision", "bf16-mixed"], "bf16-mixed")])
def test_a_slow_precision_is_replaced_unless_it_was_asked_for(
    tiny: RunConfig, given: list[str], precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.bfloat16.times_float32", lambda: 60.0)
    monkeypatch.setitem(runs.RUNS, "tiny", lambda: replace(tiny, precision="bf16-mixed", train_rows=64))
    assert main(["train", "tiny", "--output", str(tmp_path), *given]) == 0
    assert json.loads((tmp_path / "run.json").read_text())["run"]["precision"] == precision


def test_an_unknown_run_is_refused_with_the_names_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "mnist-itrative"]) == 2
    error = capsys.readouterr().err
    assert "run 'mnist-itrative' is unknown: one of mnist-direct, mnist-iterative" in error


def test_a_folder_with_another_run_is_one_line_on_stderr(tiny: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "tiny", "--output", str(tmp_path)]) == 0
    assert main(["train", "tiny", "--output", str(tmp_path), "--seed", "4"]) == 1
    assert "elbow-train: " in capsys.readouterr().err


def test_missing_data_and_missing_checkpoints_are_one_line_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "digits-tiny", "--data", str(tmp_path), "--output", str(tmp_path / "run")]) == 1
    assert "elbow-train: mnist: no " in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path)]) == 1
    assert "no checkpoint here" in capsys.readouterr().err
    assert main(["export", str(tmp_path), "--name", "tiny"]) == 1
    assert "no checkpoint here" in capsys.readouterr().err


def test_a_version_that_exists_is_one_line_on_stderr(tiny: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_weights(tmp_path / "run", build(tiny.architecture, seed=0), tiny, {})
    (tmp_path / "served" / "tiny" / "1").mkdir(parents=True)
    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "served"), "--name", "tiny"]) == 1
    assert "a version never changes" in capsys.readouterr().err
