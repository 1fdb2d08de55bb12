"""Checkpoints are rebuilt with their model, and a kill while one is written leaves the previous one whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from models.artifact import WEIGHTS, sha256_of
from models.catalogue import build
from training import checkpoint
from training.checkpoint import LAST, CheckpointError, load_last, load_weights, save_last, save_weights
from training.config import RunConfig


def test_weights_are_rebuilt_around_their_architecture(tiny_run: RunConfig, tmp_path: Path) -> None:
    model = build(tiny_run.architecture, seed=7)
    save_weights(tmp_path / "best", model, tiny_run, {"epoch": 3})
    for folder in (tmp_path / "best", tmp_path):
        again, run, facts = load_weights(folder)
        assert run == tiny_run
        assert facts == {"epoch": 3, "weights_sha256": sha256_of(tmp_path / "best" / WEIGHTS)}
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
        assert not any(parameter.requires_grad for parameter in again.parameters())


def test_the_best_weights_of_a_run_are_preferred_to_its_last(tiny_run: RunConfig, tmp_path: Path) -> None:
    for i, name in enumerate(("final", "best")):
        save_weights(tmp_path / name, build(tiny_run.architecture, seed=i), tiny_run, {"epoch": i})
    assert load_weights(tmp_path)[2]["epoch"] == 1
    assert load_weights(tmp_path / "final")[2]["epoch"] == 0


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        load_weights(tmp_path)


def test_a_damaged_checkpoint_is_refused_by_the_file(tiny_run: RunConfig, tmp_path: Path) -> None:
    save_weights(tmp_path, build(tiny_run.architecture, seed=0), tiny_run, {})
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: damaged"):
        load_weights(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(whole)
    known = json.loads((tmp_path / "checkpoint.json").read_text())
    (tmp_path / "checkpoint.json").write_text(json.dumps({"run": {**known["run"], "future": 1}}))
    with pytest.raises(CheckpointError, match=r"another version of Elbow, or damaged: .*future"):
        load_weights(tmp_path)
    (tmp_path / "checkpoint.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"checkpoint\.json: damaged"):
        load_weights(tmp_path)


def test_the_resumable_state_comes_back_and_holds_no_code(tmp_path: Path) -> None:
    assert load_last(tmp_path, torch.device("cpu")) is None
    save_last(tmp_path, {"tensor": torch.arange(3), "updates": 5})
    state = load_last(tmp_path, torch.device("cpu"))
    assert state is not None
    assert state["updates"] == 5
    torch.save({"code": Path}, tmp_path / LAST)
    with pytest.raises(Exception, match="Weights only load failed"):
        load_last(tmp_path, torch.device("cpu"))


def test_a_kill_while_saving_leaves_the_previous_state_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_last(tmp_path, {"updates": 1})

    def killed(state: object, file: Path) -> None:
        file.write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        save_last(tmp_path, {"updates": 2})
    assert load_last(tmp_path, torch.device("cpu")) == {"updates": 1}


def test_a_kill_while_saving_leaves_the_previous_weights_whole(
    tiny_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(tiny_run.architecture, seed=1)
    save_weights(tmp_path, model, tiny_run, {"epoch": 1})

    def killed(tensors: object, file: Path) -> None:
        file.write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        save_weights(tmp_path, build(tiny_run.architecture, seed=2), tiny_run, {"epoch": 2})
    again, _, facts = load_weights(tmp_path)
    assert facts["epoch"] == 1
    assert torch.equal(next(again.parameters()), next(model.parameters()))
    assert json.loads((tmp_path / "checkpoint.json").read_text())["run"]["name"] == "tiny"
