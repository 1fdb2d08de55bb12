"""The whole report on a small model: pictures, page and numbers."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from training.data.catalogue import load
from training.data.errors import DataError
from training.report import make
from training.report.make import Effort, Report
from training.report.subject import ReportError, Subject

PNG = b"\x89PNG\r\n\x1a\n"
FIGURES = ["elbo_by_epoch", "gradient_by_epoch", "reconstruction_strips", "landscape", "elbo_by_steps"]


@pytest.fixture(scope="module")
def folder(trained: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory, small_effort: Effort) -> Path:
    to = tmp_path_factory.mktemp("report") / "new" / "folder"
    Report(trained("iterative"), to, z2=trained("z2"), direct=trained("direct"), effort=small_effort, quiet=True).write()
    return to


@pytest.fixture
def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def test_every_figure_is_a_png_of_readable_width(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted([*(f"{name}.png" for name in FIGURES), "index.html", "report.json"])
    for name in FIGURES:
        data = (folder / f"{name}.png").read_bytes()
        assert data.startswith(PNG)
        assert 500 < int.from_bytes(data[16:20], "big") <= 1300


def test_the_page_embeds_all_figures_and_needs_nothing_else(folder: Path) -> None:
    page = (folder / "index.html").read_text()
    embedded = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    assert embedded == [(folder / f"{name}.png").read_bytes() for name in FIGURES]
    assert page.count("<img") == len(FIGURES)
    assert "http" not in page.replace("http-equiv", "")


def test_captions_say_what_was_measured_on_which_rows_and_by_which_code(folder: Path, report: dict[str, Any]) -> None:
    page = (folder / "index.html").read_text()
    assert page.count("tiny-iterative, epoch 3 of 3") >= len(FIGURES)
    assert page.count(report["made"]["commit"]) >= len(FIGURES)
    assert report["made"]["date"] in page
    caption = report["figures"]["elbo_by_steps"]["caption"]
    assert "first 16 validation rows" in caption
    assert "8 fresh samples per row" in caption
    assert "2 antithetic samples per row" in caption
    assert "0.1, 0.01" in caption


def test_the_numbers_behind_the_curves_are_kept(report: dict[str, Any]) -> None:
    assert list(report["figures"]) == FIGURES
    data = {name: figure["data"] for name, figure in report["figures"].items()}
    learned = data["elbo_by_steps"]["traces"]["learned"]
    assert learned["elbo"][data["elbo_by_steps"]["trained_steps"]] > learned["elbo"][0]
    assert data["elbo_by_steps"]["traces"]["adam"]["rate"] in (0.1, 0.01)
    assert data["elbo_by_steps"]["direct"] is not None
    assert len(data["landscape"]["learned"]["mu"]) == 17
    assert data["gradient_by_epoch"]["epochs"] == [1, 2, 3]
    assert all(len(line) == 4 for line in data["gradient_by_epoch"]["grad_mu"])
    assert set(data["elbo_by_epoch"]["direct"]) == {"epochs", "valid_elbo"}
    assert report["checkpoint"]["trained_steps"] == 3
    assert report["direct"]["name"] == "tiny-direct"


def test_a_figure_is_on_disk_before_the_next_is_measured(
    trained: Callable[[str], Path], tmp_path: Path, small_effort: Effort, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Report) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Report, "_race", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Report(trained("iterative"), tmp_path, effort=small_effort, quiet=True).write()
    kept = ["elbo_by_epoch", "gradient_by_epoch", "reconstruction_strips"]
    assert list(json.loads((tmp_path / "report.json").read_text())["figures"]) == kept
    assert (tmp_path / "index.html").read_text().count("<img") == len(kept)
    assert not list(tmp_path.glob("*.partial"))


def test_without_a_log_its_figures_are_left_out(trained: Callable[[str], Path], tmp_path: Path, small_effort: Effort) -> None:
    bare = tmp_path / "checkpoint"
    shutil.copytree(trained("iterative") / "best", bare)
    Report(bare, tmp_path / "report", effort=small_effort, quiet=True).write()
    assert list(json.loads((tmp_path / "report" / "report.json").read_text())["figures"]) == ["reconstruction_strips", "elbo_by_steps"]


@pytest.mark.parametrize(
    ("checkpoint", "companions", "message"),
    [
        ("direct", {}, "pass it as --direct"),
        ("iterative", {"direct": "z2"}, "a direct model is wanted"),
        ("iterative", {"z2": "iterative"}, "one latent level of size 2"),
    ],
)
def test_models_that_do_not_fit_their_place_are_refused(
    trained: Callable[[str], Path], tmp_path: Path, checkpoint: str, companions: dict[str, str], message: str
) -> None:
    with pytest.raises(ReportError, match=message):
        Report(trained(checkpoint), tmp_path, **{role: trained(name) for role, name in companions.items()})  # type: ignore[arg-type]


def test_more_rows_than_there_are_is_refused(trained: Callable[[str], Path], tmp_path: Path, small_effort: Effort) -> None:
    effort = replace(small_effort, race=replace(small_effort.race, rows=64))
    with pytest.raises(ReportError, match="--rows 64: at most 63"):
        Report(trained("iterative"), tmp_path, effort=effort)


def test_a_set_that_holds_out_one_image_is_too_small(
    trained: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message once named an option that was not given."""
    images = load(Subject.load(trained("iterative")).run.data.name)
    monkeypatch.setattr(make, "data_of", lambda *args: replace(images, valid=images.valid[:1], valid_labels=None))
    with pytest.raises(ReportError, match="holds out 1 image for validation: too few"):
        Report(trained("iterative"), tmp_path, fewer_rows=True)


@pytest.mark.parametrize("role", ["iterative", "direct"])
def test_data_that_changed_are_refused(role: str, trained: Callable[[str], Path], tmp_path: Path) -> None:
    runs = {name: shutil.copytree(trained(name), tmp_path / name) for name in ("iterative", "direct")}
    described = runs[role] / "best/checkpoint.json"
    described.write_text(json.dumps({**json.loads(described.read_text()), "data_sha256": "0" * 64}))
    with pytest.raises(DataError, match=f"tiny-{role} was trained on another npz:"):
        Report(runs["iterative"], tmp_path / "report", direct=runs["direct"])
