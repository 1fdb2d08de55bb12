"""Numbers that make no sense and options of another kind of model are refused in a line, before anything is read or measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.catalogue import build, build_filter
from tests.training.test_sequence_loop import RUN
from training.__main__ import main
from training.checkpoint import save_weights
from training.config import RunConfig

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        *((["train", "jsb-own", "--seconds", text], "is not a number of seconds above 0") for text in ("0", "-3", "nan", "inf", "ten")),
        *((["train", "digits-tiny", "--threads", text], "above 0") for text in ("0", "-1")),
        *((["train", "digits-tiny", "--seed", text], "from 0 to 4294967295") for text in ("-1", "4294967296", "1.5")),
        (["train", "digits-tiny", "--epochs", "0"], "above 0"),
        *((["evaluate", "run", option, text], "above 0") for option in ("--rows", "--particles", "--threads") for text in ("0", "-5")),
        *((["evaluate", "run", option, "-1"], "0 or above") for option in ("--importance-rows", "--gap-rows", "--steps")),
        *((["export", "run", "--name", "x", "--rows", text], "above 0") for text in ("0", "-1")),
        (["quantise", "run", "--to", "x", "--rows", "0"], "above 0"),
        *((["report", "run", "--rows", text], "above 0") for text in ("0", "-1")),
        (["report", "run", "--digit", "-1"], "0 or above"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_number_that_makes_no_sense_is_refused(options: list[str], said: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(options)
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def checkpoint(tiny_run: RunConfig, tmp_path: Path) -> Callable[[str], str]:
    def make(kind: str) -> str:
        if kind == "static":
            save_weights(tmp_path / kind, build(tiny_run.architecture, seed=0), tiny_run, {})
        else:
            save_weights(tmp_path / kind, build_filter(RUN.architecture, seed=0), RUN, {})
        return str(tmp_path / kind)

    return make


@pytest.mark.parametrize(
    ("kind", "command", "options"),
    [
        *(("static", "evaluate", option) for option in (["--split", "test"], ["--particles", "8"], ["--steps", "0"])),
        *(("filter", "evaluate", option) for option in (["--rows", "8"], ["--importance-rows", "0"], ["--gap-rows", "8"])),
        *(("filter", "report", option) for option in (["--landscape", "x"], ["--direct", "x"], ["--rows", "8"], ["--digit", "0"])),
        ("filter", "report", ["--optimum"]),
    ],
)
def test_options_of_the_other_kind_of_model_are_refused_by_name(
    kind: str, command: str, options: list[str], checkpoint: Callable[[str], str], capsys: Capture
) -> None:
    assert main([command, checkpoint(kind), *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"elbow-train: {options[0]}: ")
    assert "leave it out" in error
    assert error.count("\n") == 1


def test_epochs_and_seconds_are_not_given_together(capsys: Capture) -> None:
    assert main(["train", "jsb-own", "--epochs", "3", "--seconds", "3"]) == 1
    assert "--epochs, --seconds: a run ends after the one or the other" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["banana"], "--device banana: cpu or cuda"),
        (["cuda"], "--device cuda: torch sees 0 CUDA devices"),
        (["cuda", "--processes", "2"], "--device cuda, --processes 2: torch sees 0 CUDA devices"),
    ],
)
def test_a_device_that_is_not_there_is_one_line(options: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["train", "digits-tiny", "--device", *options]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_path_that_leads_nowhere_is_one_line_that_names_it(tmp_path: Path, checkpoint: Callable[[str], str], capsys: Capture) -> None:
    (tmp_path / "file").touch()
    assert main(["report", checkpoint("filter"), "--to", str(tmp_path / "file/report")]) == 1
    error = capsys.readouterr().err
    assert error == f"elbow-train: {tmp_path / 'file/report'}: Not a directory\n"


def test_all_checkpoints_are_loaded_before_the_first_is_measured(
    tmp_path: Path, checkpoint: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from training import evaluate

    measured: list[Any] = []
    monkeypatch.setattr(evaluate, "evaluate", lambda *args: measured.append(args))
    assert main(["evaluate", checkpoint("static"), str(tmp_path / "nothing")]) == 1
    assert f"{tmp_path / 'nothing'}: no checkpoint here" in capsys.readouterr().err
    assert not measured
