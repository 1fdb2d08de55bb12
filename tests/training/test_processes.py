"""Several processes share one run: real ones, over gloo. What they make together is what one process makes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.test_sequence_loop import CARRIED, RUN
from training.config import OptimiserConfig, RunConfig
from training.loop import Trainer
from training.run_loop import TrainingFailed
from training.sequence_config import SequenceRunConfig

ROOT = Path(__file__).parents[2]
DRIVER = """
import json, os, signal, sys
from pathlib import Path
import torch
from training import loop, run_loop, sequence_loop
from training.config import RunConfig
from training.sequence_config import SequenceRunConfig

def main():
    torch.set_num_threads(1)
    described, folder, processes, at, act = json.loads(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:5]), sys.argv[5]
    sequences = "kl_warmup_epochs" in described and "one_step_share" in described
    fabric = run_loop.fabric_for("cpu", processes)
    fabric.launch()
    if act == "still":  # nothing random but the order of the rows: as many numbers may be drawn as processes like
        loop.observe = lambda rows, *_: (rows.float() / 255 > 0.5).float()
        loop.fresh_noise = sequence_loop.fresh_noise = lambda sizes, rows, samples, *_: tuple(torch.zeros(rows, samples, n) for n in sizes)
    cls = sequence_loop.SequenceTrainer if sequences else loop.Trainer
    run = (SequenceRunConfig if sequences else RunConfig).from_dict(described)
    trainer = cls(run, folder, fabric)
    plain, count = cls.update, 0
    def update(self, batch):
        nonlocal count
        count += 1
        if count == at and act == "kill":
            os.killpg(os.getpgrp(), signal.SIGKILL)
        if count == at and act == "interrupt" and fabric.global_rank == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self, batch)
    cls.update = update
    try:
        trainer.fit()
    except KeyboardInterrupt:
        (folder / f"stopped{fabric.global_rank}").write_text(str(trainer.updates))
        raise SystemExit(130)
    seconds = torch.tensor(trainer.spent_s, dtype=torch.float64)
    torch.save({**trainer.model.state_dict(), "seconds": seconds}, folder / f"rank{fabric.global_rank}.pt")

if __name__ == "__main__":
    main()
"""


Run = RunConfig | SequenceRunConfig


def launch(run: Run, folder: Path, processes: int, at: int = 0, act: str = "none") -> subprocess.CompletedProcess[str]:
    driver = folder.parent / "driver.py"
    driver.write_text(DRIVER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(driver), json.dumps(run.to_dict()), str(folder), str(processes), str(at), act]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False, start_new_session=True)


def finished(run: Run, folder: Path, processes: int, act: str = "none") -> dict[str, torch.Tensor]:
    done = launch(run, folder, processes, act=act)
    assert done.returncode == 0, done.stderr
    return load_file(folder / "final" / "weights.safetensors")


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def plain(run: RunConfig) -> RunConfig:
    return replace(run, data=replace(run.data, mask_probability=0.0), epochs=2)


@pytest.fixture(params=["static", *(pytest.param(name, marks=pytest.mark.slow) for name in ("crops", "carried"))])
def run(request: pytest.FixtureRequest, tiny_run: RunConfig) -> Run:
    still = replace(RUN, data=replace(RUN.data, transpose=0), epochs=3, kl_warmup_epochs=0)
    carried = replace(CARRIED, data=replace(CARRIED.data, transpose=0), epochs=1, kl_warmup_epochs=0)
    return {"static": plain(tiny_run), "crops": still, "carried": carried}[request.param]


def test_two_processes_make_the_same_run_as_one(run: Run, tmp_path: Path) -> None:
    """As many updates of as many rows, and gradients summed over both: without noise the weights agree to rounding."""
    one, two = finished(run, tmp_path / "one", 1, "still"), finished(run, tmp_path / "two", 2, "still")
    assert log(tmp_path / "one")[-1]["updates"] == log(tmp_path / "two")[-1]["updates"]
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    seen = [[line["train_elbo"][-1] for line in log(tmp_path / folder)] for folder in ("one", "two")]
    torch.testing.assert_close(*map(torch.tensor, seen), rtol=1e-4, atol=1e-4)
    ranks = [torch.load(tmp_path / "two" / f"rank{rank}.pt") for rank in (0, 1)]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0]), "weights, and the clock, are one"


@pytest.mark.slow  # six processes, each of which imports torch
def test_killed_and_resumed_two_processes_end_with_the_same_bits(tiny_run: RunConfig, tmp_path: Path) -> None:
    straight = finished(tiny_run, tmp_path / "straight", 2)
    assert launch(tiny_run, tmp_path / "killed", 2, at=11, act="kill").returncode == -signal.SIGKILL
    assert [line["epoch"] for line in log(tmp_path / "killed")] == [1, 2]
    resumed = finished(tiny_run, tmp_path / "killed", 2)
    assert all(torch.equal(resumed[name], value) for name, value in straight.items())


def test_an_interrupt_of_one_process_stops_all_of_them_at_the_same_update(tiny_run: RunConfig, tmp_path: Path) -> None:
    stopped = launch(tiny_run, tmp_path / "run", 2, at=6, act="interrupt")
    assert stopped.returncode == 130, stopped.stderr
    assert [(tmp_path / "run" / f"stopped{rank}").read_text() for rank in (0, 1)] == ["6", "6"]
    assert "the same command continues" in stopped.stdout


@pytest.mark.slow
def test_a_run_by_time_ends_together(tmp_path: Path) -> None:
    timed = replace(RUN, epochs=100_000, seconds=1.0, optimiser=OptimiserConfig(learning_rate=1e-3, decay="cosine"))
    finished(timed, tmp_path / "run", 2)
    assert log(tmp_path / "run")[-1]["training_seconds"] >= 1.0


def test_more_processes_than_rows_of_a_batch_are_refused(tiny_run: RunConfig, tmp_path: Path) -> None:
    fabric: Any = SimpleNamespace(world_size=2)
    with pytest.raises(TrainingFailed, match="a batch of 1 rows has not one for each of 2 processes"):
        Trainer(replace(tiny_run, batch_size=1), tmp_path, fabric)
