"""A run from start to end, and all the ways in which it may end early: each can be continued as if nothing had been."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.architecture import DirectArchitecture, VAEArchitecture
from models.catalogue import build
from training import loop, run_loop
from training.checkpoint import LAST, load_last, load_weights, save_last, save_weights
from training.config import OptimiserConfig, RunConfig
from training.data.errors import DataError
from training.loop import Trainer
from training.run_loop import TrainingFailed, fabric_for
from training.sequence_config import SequenceRunConfig

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def trainer(run: RunConfig, folder: Path) -> Trainer:
    return Trainer(run, folder, fabric_for("cpu"))


def weights(folder: Path) -> bytes:
    return (folder / "final" / "weights.safetensors").read_bytes()


def log(folder: Path) -> list[dict[str, object]]:
    """The log without the times, which no two runs share."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith("seconds")} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(tiny_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    trainer(tiny_run, folder).fit()
    return folder


def when(update: int, act: Callable[[Trainer], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Acts in the middle of the given update: batch and noise drawn, weights not yet stepped."""
    plain = loop.Gradients.__call__

    def acting(self: loop.Gradients, *args: object) -> object:
        trace = plain(self, *args)  # type: ignore[arg-type]
        counted["updates"] += 1
        if counted["updates"] == update:
            act(self._model)  # type: ignore[arg-type]
        return trace

    counted = {"updates": 0}
    monkeypatch.setattr(loop.Gradients, "__call__", acting)


def test_a_run_leaves_its_files_and_its_elbo_rises(uninterrupted: Path, tiny_run: RunConfig) -> None:
    lines = [json.loads(line) for line in (uninterrupted / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert [line["updates"] for line in lines] == [4, 8, 12, 16]
    assert all(len(line["valid_elbo"]) == 3 for line in lines)
    assert lines[-1]["valid_elbo"][-1] > lines[0]["valid_elbo"][-1]
    described = json.loads((uninterrupted / "run.json").read_text())
    assert RunConfig.from_dict(described["run"]) == tiny_run
    assert len(described["data_sha256"]) == 64
    best = max(lines, key=lambda line: line["valid_elbo"][-1])
    assert load_weights(uninterrupted / "best")[2]["valid_elbo"] == best["valid_elbo"]
    assert load_weights(uninterrupted / "final")[2]["valid_elbo"] == lines[-1]["valid_elbo"]
    assert list((uninterrupted / "tensorboard").iterdir())


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(uninterrupted: Path, tiny_run: RunConfig, tmp_path: Path) -> None:
    trainer(tiny_run, tmp_path / "same").fit()
    assert weights(tmp_path / "same") == weights(uninterrupted)
    trainer(replace(tiny_run, seed=1), tmp_path / "other").fit()
    assert weights(tmp_path / "other") != weights(uninterrupted)


def test_a_finished_run_started_again_changes_nothing(uninterrupted: Path, tiny_run: RunConfig) -> None:
    """Its checkpoint once lost the validation ELBO here."""
    before = {file: file.read_bytes() for folder in ("best", "final") for file in (uninterrupted / folder).iterdir()}
    lines = log(uninterrupted)
    trainer(tiny_run, uninterrupted).fit()
    assert {file: file.read_bytes() for file in before} == before
    assert log(uninterrupted) == lines


@pytest.mark.parametrize("update", [1, 6, 12])
def test_ctrl_c_saves_a_whole_state_and_the_resumed_run_ends_with_the_same_bits(
    update: int, uninterrupted: Path, tiny_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raised within an update, the batch and its noise were drawn but never learnt from, and the resumed run was another one."""
    with monkeypatch.context() as patched:
        when(update, lambda model: os.kill(os.getpid(), signal.SIGINT), patched)
        with pytest.raises(KeyboardInterrupt):
            trainer(tiny_run, tmp_path).fit()
    state = load_last(tmp_path, CPU)
    assert state is not None
    assert state["updates"] == update
    trainer(tiny_run, tmp_path).fit()
    assert weights(tmp_path) == weights(uninterrupted)
    assert log(tmp_path) == log(uninterrupted)


def test_a_second_ctrl_c_stops_at_once(tiny_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)

    def twice(model: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    when(2, twice, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        trainer(tiny_run, tmp_path).fit()
    assert load_last(tmp_path, CPU) is None
    assert signal.getsignal(signal.SIGINT) is before


DRIVER = """
import json, os, signal, sys
from pathlib import Path
import torch
from training import loop, run_loop
from training.config import RunConfig
torch.set_num_threads(1)
run_loop.SAVE_EVERY_S = 0.0
run = RunConfig.from_dict(json.loads(sys.argv[1]))
plain = loop.Gradients.__call__
count = 0
def killed(self, *args):
    global count
    count += 1
    if count == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, *args)
loop.Gradients.__call__ = killed
loop.Trainer(run, Path(sys.argv[2]), run_loop.fabric_for("cpu")).fit()
"""


def test_killed_with_minus_nine_in_mid_epoch_and_resumed_it_ends_with_the_same_bits(
    uninterrupted: Path, tiny_run: RunConfig, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", DRIVER, json.dumps(tiny_run.to_dict()), str(tmp_path)]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    state = load_last(tmp_path, CPU)
    assert state is not None
    # four updates an epoch: the kill fell into the third update of the second epoch
    assert (state["updates"], state["batches"]["epoch"]) == (6, 1)
    trainer(tiny_run, tmp_path).fit()
    assert weights(tmp_path) == weights(uninterrupted)
    assert log(tmp_path) == log(uninterrupted)


def test_a_kill_between_the_log_and_the_state_does_not_log_an_epoch_twice(
    uninterrupted: Path, tiny_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = loop.Trainer.save
    with monkeypatch.context() as patched:

        def save(self: Trainer) -> None:
            if self.batches.epoch == 3:
                raise SystemExit("killed")
            plain(self)

        patched.setattr(loop.Trainer, "save", save)
        with pytest.raises(SystemExit):
            trainer(tiny_run, tmp_path).fit()
    assert len(log(tmp_path)) == 3
    trainer(tiny_run, tmp_path).fit()
    assert log(tmp_path) == log(uninterrupted)
    assert weights(tmp_path) == weights(uninterrupted)


def test_a_folder_with_another_run_is_refused(tiny_run: RunConfig, tmp_path: Path) -> None:
    short = replace(tiny_run, epochs=1)
    trainer(short, tmp_path).fit()
    with pytest.raises(TrainingFailed, match="holds a run with another configuration"):
        trainer(tiny_run, tmp_path).fit()


def test_a_run_of_another_kind_or_of_other_fields_is_another_configuration(tiny_run: RunConfig, tmp_path: Path) -> None:
    """Both once ended in a traceback."""
    values = tiny_run.to_dict()
    for other in (
        SequenceRunConfig("sequences").to_dict(),
        {**values, "future": 1},
        {name: value for name, value in values.items() if name != "optimiser"},
    ):
        save_last(tmp_path, {"run": json.dumps(other)})
        with pytest.raises(TrainingFailed, match="holds a run with another configuration"):
            trainer(tiny_run, tmp_path).resume()


def test_changed_data_are_named_before_the_configuration_that_follows_from_them(tiny_run: RunConfig, tmp_path: Path) -> None:
    other = replace(tiny_run, data=replace(tiny_run.data, shape=(8, 8)))
    save_last(tmp_path, {"run": json.dumps(other.to_dict()), "data_sha256": "0" * 64})
    with pytest.raises(DataError, match=r"was trained on another npz:.* \(sha256 000000000000…\)"):
        trainer(tiny_run, tmp_path).resume()


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 and nothing", None])
def test_a_damaged_state_is_one_line_that_names_the_file(damage: bytes | None, tiny_run: RunConfig, tmp_path: Path) -> None:
    if damage is None:
        save_last(tmp_path, {"updates": 1})
    else:
        (tmp_path / LAST).write_bytes(damage)
    with pytest.raises(TrainingFailed, match=r"last\.pt is damaged \(.+\): put a copy of it back, or") as failed:
        trainer(tiny_run, tmp_path).resume()
    assert "\n" not in str(failed.value)


def test_a_last_line_of_the_log_cut_short_is_dropped_on_resume(uninterrupted: Path, tiny_run: RunConfig, tmp_path: Path) -> None:
    """A kill while it was written once stopped resume for good."""
    folder = shutil.copytree(uninterrupted, tmp_path / "run")
    with (folder / "log.jsonl").open("a") as written:
        written.write('{"epoch": 5, "upda')
    assert trainer(tiny_run, folder).fit()["epoch"] == 4
    assert (folder / "log.jsonl").read_text() == (uninterrupted / "log.jsonl").read_text()


def test_a_parent_that_is_missing_or_of_another_size_is_named(tiny_run: RunConfig, tmp_path: Path) -> None:
    child = replace(tiny_run, name="child", parent="first")
    with pytest.raises(TrainingFailed, match=r"weights of the run first, .* beside --output: there is no .*/first\. First .*train first`"):
        trainer(child, tmp_path / "child")
    small = replace(tiny_run, name="small", architecture=replace(tiny_run.architecture, generative=VAEArchitecture(784, 3, (16,))))
    save_weights(tmp_path / "first", build(small.architecture, seed=0), small, {"epoch": 1})
    with pytest.raises(
        TrainingFailed, match=r"child begins with the weights of small \(.*/first\), which has other sizes: .*3.* there, .*4"
    ):
        trainer(child, tmp_path / "child")


def test_nan_ends_the_run_names_the_update_and_keeps_the_last_good_state(
    tiny_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poison(model: torch.nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.fill_(math.nan)

    # update 6 steps to weights that are not finite; update 7 sees it
    when(6, poison, monkeypatch)
    with pytest.raises(TrainingFailed, match=r"update 7 \(epoch 2\): the ELBO or its gradient is not finite\. The last good .*last\.pt"):
        trainer(tiny_run, tmp_path).fit()
    state = load_last(tmp_path, CPU)
    assert state is not None
    assert state["updates"] == 4
    assert all(bool(torch.isfinite(value).all()) for value in state["model"].values())


def test_weights_that_are_not_finite_never_replace_a_good_state(
    tiny_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ELBO of the update that breaks the weights is still finite: a save just then overwrote the last good state."""

    def poison(model: torch.nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.fill_(math.nan)

    monkeypatch.setattr(run_loop, "SAVE_EVERY_S", -1.0)
    when(3, poison, monkeypatch)
    with pytest.raises(TrainingFailed, match=r"update 3 .* a weight is not finite"):
        trainer(tiny_run, tmp_path).fit()
    state = load_last(tmp_path, CPU)
    assert state is not None
    assert state["updates"] == 2
    assert not (tmp_path / (LAST + ".partial")).exists()


def test_a_run_that_fails_at_once_says_that_nothing_was_saved(tiny_run: RunConfig, tmp_path: Path) -> None:
    wild = replace(tiny_run, optimiser=OptimiserConfig(learning_rate=1e30))
    with pytest.raises(TrainingFailed, match=r"update 2 .*No checkpoint was saved yet"):
        trainer(wild, tmp_path).fit()


def test_a_direct_model_trains_in_the_same_loop(tiny_run: RunConfig, tmp_path: Path) -> None:
    run = replace(tiny_run, architecture=replace(tiny_run.architecture, inference=DirectArchitecture((16,))), epochs=2)
    line = trainer(run, tmp_path).fit()
    assert len(line["train_elbo"]) == len(line["valid_elbo"]) == 1
    assert math.isfinite(line["valid_elbo"][0])


def test_rates_follow_the_schedule_epoch_by_epoch(uninterrupted: Path, tiny_run: RunConfig) -> None:
    rates = [line["learning_rate"] for line in log(uninterrupted)]
    assert rates == [tiny_run.optimiser.rate(epoch, tiny_run.epochs) for epoch in range(4)]


def test_validation_is_the_same_whenever_it_is_asked(tiny_run: RunConfig, tmp_path: Path) -> None:
    one = trainer(tiny_run, tmp_path)
    before = {name: generator.get_state() for name, generator in one.generators.items()}
    assert one.validate() == one.validate()
    assert all(torch.equal(state, one.generators[name].get_state()) for name, state in before.items())
