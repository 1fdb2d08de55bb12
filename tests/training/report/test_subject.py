"""Where logs are found and what is read of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from training.checkpoint import CheckpointError
from training.report.history import history
from training.report.subject import Subject, read_log


def entry(epoch: int, elbo: float = -100.0) -> str:
    return json.dumps({"epoch": epoch, "valid_elbo": [-500.0, elbo], "grad_mu": [9.0, 1.0], "grad_log_sigma": [9.0, 1.0]})


def test_the_log_lies_beside_the_weights_or_one_folder_up(tmp_path: Path) -> None:
    best = tmp_path / "best"
    best.mkdir()
    assert read_log(best) == []
    (tmp_path / "log.jsonl").write_text(entry(1) + "\n")
    assert [line["epoch"] for line in read_log(best)] == [1]
    (best / "log.jsonl").write_text(entry(7) + "\n")
    assert [line["epoch"] for line in read_log(best)] == [7]


def test_a_line_cut_short_is_left_out_and_a_repeated_epoch_counts_once(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("\n".join([entry(1), entry(2, -90.0), entry(2, -80.0), entry(3)[:20]]))
    log = read_log(tmp_path)
    assert [line["epoch"] for line in log] == [1, 2]
    assert history(log).valid_elbo[1] == [-500.0, -80.0]
    assert history(log).trained_steps == 1


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
