"""Where logs are found and what is read of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from training.checkpoint import CheckpointError
from training.report.captions import elbo_by_epoch
from training.report.history import history
from training.report.subject import Subject, read_log
from training.runs.mnist import digits_tiny

RUN = digits_tiny()


def entry(epoch: int, elbo: float = -100.0) -> str:
    return json.dumps({"epoch": epoch, "valid_elbo": [-500.0, elbo], "grad_mu": [9.0, 1.0], "grad_log_sigma": [9.0, 1.0]})


def test_the_log_lies_beside_the_weights_or_one_folder_up(tmp_path: Path) -> None:
    best = tmp_path / "best"
    best.mkdir()
    assert read_log(best, RUN) == []
    (tmp_path / "log.jsonl").write_text(entry(1) + "\n")
    assert [line["epoch"] for line in read_log(best, RUN)] == [1]
    (best / "log.jsonl").write_text(entry(7) + "\n")
    assert [line["epoch"] for line in read_log(best, RUN)] == [7]


def phase(folder: Path, name: str, parent: str | None, *entries: str) -> None:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"run": {"name": name, "parent": parent}}))
    (folder / "log.jsonl").write_text("\n".join(entries))


@pytest.mark.parametrize("shipped", [False, True])
def test_a_run_goes_on_from_the_logs_of_those_it_began_from(tmp_path: Path, shipped: bool) -> None:
    home, checkpoint = (tmp_path / "training", tmp_path / "1") if shipped else (tmp_path, tmp_path / "long" / "best")
    phase(home / "short", "short", "lost", entry(1, -120.0), entry(2, -110.0))
    phase(home / "late", "late", "short", entry(1, -105.0))
    phase(home / "long", "long", "late", entry(1).replace("[-500.0, -100.0]", "[-500.0, -100.0, -99.0]"))
    checkpoint.mkdir()
    made = history(read_log(checkpoint, replace(RUN, name="long", parent="late")))
    assert made.epochs == [1, 2, 3, 4]
    assert made.phases == [("short", 1), ("late", 3), ("long", 4)]
    assert (made.trained_steps, made.steps) == ([1, 1, 2], 1)
    assert made.valid_elbo == [[-500.0, -120.0], [-500.0, -110.0], [-500.0, -105.0], [-500.0, -100.0]]
    assert "late from epoch 3 (K = 1), long from epoch 4 (K = 2)" in elbo_by_epoch(made)


def test_a_line_cut_short_is_left_out_and_a_repeated_epoch_counts_once(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("\n".join([entry(1), entry(2, -90.0), entry(2, -80.0), entry(3)[:20]]))
    log = read_log(tmp_path, RUN)
    assert [line["epoch"] for line in log] == [1, 2]
    assert history(log).valid_elbo[1] == [-500.0, -80.0]
    assert history(log).steps == 1
    assert "Dotted" not in elbo_by_epoch(history(log))


def test_a_subject_is_found_from_its_run_or_its_checkpoint(trained: Callable[[str], Path]) -> None:
    run, best = Subject.load(trained("iterative")), Subject.load(trained("iterative") / "best")
    assert run.log == best.log != []
    assert str(run) == "tiny-iterative, epoch 3 of 3"


def test_a_folder_without_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        Subject.load(tmp_path)


def test_an_empty_log_gives_no_history() -> None:
    with pytest.raises(ValueError, match="no entries"):
        history([])
