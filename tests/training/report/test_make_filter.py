"""The report of a sequence model writes its figures, and its numbers are those of the evaluation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from models.catalogue import build_filter
from tests.training.test_sequence_loop import OWN, RUN
from training.checkpoint import save_weights
from training.config import RefinementConfig
from training.data.ragged import Ragged
from training.data.sequence_catalogue import load_sequences
from training.report import make_filter
from training.report.filtering import Gains, frames_seen, gains
from training.report.make_filter import ROLL_FRAMES, write_filter_report


def test_a_report_of_music_has_a_piano_roll_and_the_worth_of_steps(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    save_weights(tmp_path / "run", build_filter(RUN.architecture, seed=0), RUN, {"epoch": 1})
    written = write_filter_report(tmp_path / "run", tmp_path / "report")
    assert {file.name for file in written.parent.iterdir()} >= {"piano_roll.png", "free_energy_by_steps.png", "gain_by_step.png"}
    report = json.loads((written.parent / "report.json").read_text())
    assert len(report["figures"]["free_energy_by_steps"]["data"]["within"]) == 3
    assert "data:image/png" in written.read_text()


def test_a_filter_of_its_own_has_no_steps_to_show(tmp_path: Path) -> None:
    run = replace(RUN, architecture=OWN, refinement=RefinementConfig(steps=0))
    save_weights(tmp_path / "run", build_filter(OWN, seed=0), run, {"epoch": 1})
    written = write_filter_report(tmp_path / "run", tmp_path / "report")
    assert not (written.parent / "gain_by_step.png").exists()


@pytest.mark.parametrize("sounds", [True, False])
def test_a_piece_that_begins_with_a_long_rest_or_is_silent_is_drawn(sounds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = load_sequences(RUN.data.name)
    piece = np.zeros((ROLL_FRAMES + 9, 88), np.uint8)
    piece[ROLL_FRAMES + 3 :, 40] = sounds
    monkeypatch.setattr(make_filter, "data_of", lambda *args: replace(sequences, valid=Ragged.of([piece])))
    monkeypatch.setattr(make_filter, "gains", lambda *args: Gains([-1.0] * 3, [0, 1], [-1.0] * 2, 1))  # no gain to share out either
    save_weights(tmp_path / "run", build_filter(RUN.architecture, seed=0), RUN, {})
    written = write_filter_report(tmp_path / "run", tmp_path / "report")
    first = ROLL_FRAMES + 3 if sounds else 0
    assert f"Frames {first} to " in written.read_text()


def test_frames_and_gains_are_measured_as_they_say() -> None:
    model = build_filter(RUN.architecture, seed=0)
    valid = load_sequences(RUN.data.name).valid
    seen = frames_seen(model, valid[0], 2, 4, 2)
    np.testing.assert_array_equal(seen.x, valid[0][2:6])
    assert seen.mean.shape == (4, 3, 88)
    assert ((seen.mean > 0) & (seen.mean < 1)).all()
    worth = gains(model, valid, trained=2, most=4, samples=1, sequences=2, frames=5)
    assert worth.steps == [0, 1, 2, 3, 4]
    assert len(worth.within) == 3
    assert worth.within[-1] == pytest.approx(worth.across[2], abs=1e-9)
