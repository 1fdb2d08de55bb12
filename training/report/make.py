"""Measures, draws and writes one figure after the other, the quick ones first.

After each figure its PNG, report.json and index.html are on disk: Ctrl-C loses only what was being measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from training.checkpoint import data_of
from training.data.images import Images
from training.data.same import refuse_other_data
from training.records import write_json, write_text
from training.report import captions, figures, style
from training.report.history import history
from training.report.landscape import landscape
from training.report.page import Entry, page
from training.report.race import RaceEffort, Refiner, race
from training.report.strips import strips
from training.report.subject import ReportError, Subject, made_by, one_row_per_class, validation_rows

LANDSCAPE_TUNING_ROWS = 50


@dataclass(frozen=True)
class Effort:
    """How much to spend on a report. `strip_rows`: digits in the reconstruction strips; `landscape_row`: the digit of the landscape."""

    race: RaceEffort = field(default_factory=RaceEffort)
    strip_rows: int = 10
    landscape_row: int = 0
    landscape_spacing: float = 0.05


@dataclass(frozen=True)
class Made:
    """A figure with its words and the numbers behind it."""

    title: str
    caption: str
    figure: Figure
    numbers: Mapping[str, Any]
    table: Sequence[Sequence[str]] = ()


class Report:
    """The figures of one checkpoint, written to a folder. `fewer_rows`: the effort's rows may be lowered to half of a small set's.

    Raises:
        ReportError: the checkpoint has no refinement steps to show, a companion is not what its option says, or too few rows are held out.
        DataError: the data are not those that the checkpoints were trained on.
    """

    def __init__(
        self,
        checkpoint: Path,
        folder: Path,
        *,
        z2: Path | None = None,
        direct: Path | None = None,
        effort: Effort | None = None,
        fewer_rows: bool = False,
        data_root: str | None = None,
        quiet: bool = False,
    ):
        self.folder, self.effort, self.data_root, self.quiet = folder, effort or Effort(), data_root, quiet
        self.subject = Subject.load(checkpoint)
        self.z2 = Subject.load(z2) if z2 else None
        self.direct = Subject.load(direct) if direct else None
        self.images: Images = data_of(self.subject.run, self.subject.facts, data_root)
        if fewer_rows:
            self.effort = _within(self.effort, len(self.images.valid))
        self.made_by = made_by()
        self._refuse_misfits()
        self.entries: list[Entry] = []
        self.numbers: dict[str, Any] = {}

    def _refuse_misfits(self) -> None:
        if not self.subject.model.inference.refines:
            raise ReportError(
                f"{self.subject.folder} is a direct model, with no steps to show: pass it as --direct beside an iterative one"
            )
        if self.direct and self.direct.model.inference.refines:
            raise ReportError(f"--direct {self.direct.folder} refines: a direct model is wanted")
        if self.direct and (self.direct.run.data.name, self.direct.run.data.shape) != (
            self.subject.run.data.name,
            self.subject.run.data.shape,
        ):
            raise ReportError(f"--direct {self.direct.folder}: trained on {self.direct.run.data.name}, not on {self.subject.run.data.name}")
        if self.z2 and (self.z2.model.generative.latent_sizes != (2,) or not self.z2.model.inference.refines):
            raise ReportError(f"--landscape {self.z2.folder} must be an iterative model with one latent level of size 2")
        if self.direct:
            direct = self.direct.run
            refuse_other_data(direct.name, direct.data.name, self.direct.facts.get("data_sha256"), self.images.sha256)
        most = len(self.images.valid) - 1
        if most < 1:
            held_out = f"{len(self.images.valid)} image{'s' if most else ''}"
            raise ReportError(f"{self.subject.run.data.name} holds out {held_out} for validation: too few for a report, which needs 2")
        if self.effort.race.rows > most:
            raise ReportError(f"--rows {self.effort.race.rows}: at most {most}, so that some are left to choose learning rates on")

    def write(self) -> Path:
        """All figures; the path of the page. A figure whose source is missing (no log, no z = 2 model) is left out."""
        self.folder.mkdir(parents=True, exist_ok=True)
        makers: dict[str, Callable[[], Made]] = {}
        if self.subject.log:
            makers |= {"elbo_by_epoch": self._elbo_by_epoch, "gradient_by_epoch": self._gradient_by_epoch}
        makers["reconstruction_strips"] = self._strips
        if self.z2:
            makers["landscape"] = self._landscape
        makers["elbo_by_steps"] = self._race
        with tqdm(makers.items(), desc="figures", disable=self.quiet) as bar:
            for name, maker in bar:
                bar.set_postfix_str(name)
                self._write(name, maker())
        return self.folder / "index.html"

    # one figure each -------------------------------------------------------------------------------------------------

    def _race(self) -> Made:
        effort, run = self.effort.race, self.subject.run
        x = self._rows(effort.rows + effort.tuning_rows)
        data = race(self.subject.model, run.refinement, x, effort, self.direct.model if self.direct else None, self.quiet)
        words = captions.race(data, run.refinement, effort.rates, run.data.name, self.made_by["threads"], self.direct)
        return Made("ELBO by step and by time", words, figures.elbo_by_steps(data), asdict(data), captions.race_table(data))

    def _strips(self) -> Made:
        rows = one_row_per_class(self.images, self.effort.strip_rows)
        refinement = self.subject.run.refinement
        refiner = Refiner(self.subject.model, self.subject.model.inference, refinement)
        data = strips(refiner, self._rows(max(rows) + 1)[rows], rows, self.images.shape)
        binarised = self.subject.run.architecture.generative.likelihood == "bernoulli"
        words = captions.strips(data, refinement, self.images.valid_labels is not None, binarised)
        numbers = {"steps": data.steps, "rows": data.rows, "elbo": data.elbo, "samples": data.samples}
        return Made("Reconstructions by step", words, figures.reconstruction_strips(data), numbers)

    def _landscape(self) -> Made:
        assert self.z2 is not None
        run, row = self.z2.run, self.effort.landscape_row
        images = data_of(run, self.z2.facts, self.data_root)
        x = validation_rows(images, row + 1 + LANDSCAPE_TUNING_ROWS, run.architecture.generative.likelihood, _device(self.z2))
        tuning = x[row + 1 :]
        if not len(tuning):
            raise ReportError(f"--digit {row}: {run.data.name} has {len(images.valid)} validation rows, and some must follow the digit")
        data = landscape(
            self.z2.model,
            run.refinement,
            x,
            row,
            images.shape,
            tuning=tuning,
            spacing=self.effort.landscape_spacing,
            rates=self.effort.race.rates,
            quiet=self.quiet,
        )
        paths = {"learned": data.learned, "ascent": data.ascent}
        numbers = {
            "row": data.row,
            "peak": data.peak,
            "peak_log_joint": float(data.log_joint.max()),
            **{name: {"mu": path.mu.tolist(), "elbo": path.elbo, "rate": path.rate} for name, path in paths.items()},
        }
        words = captions.landscape(data, run.refinement, len(tuning), self.z2)
        return Made("The landscape of one digit", words, figures.landscape_paths(data), numbers)

    def _gradient_by_epoch(self) -> Made:
        data = history(self.subject.log)
        numbers = {"epochs": data.epochs, "phases": data.phases, "grad_mu": data.grad_mu, "grad_log_sigma": data.grad_log_sigma}
        words = captions.gradient_by_epoch(data, self.subject.run.refinement)
        return Made("Gradient by step, through training", words, figures.gradient_by_epoch(data), numbers)

    def _elbo_by_epoch(self) -> Made:
        data = history(self.subject.log)
        numbers: dict[str, Any] = {"epochs": data.epochs, "phases": data.phases, "valid_elbo": data.valid_elbo}
        direct = history(self.direct.log) if self.direct and self.direct.log else None
        if direct:
            numbers["direct"] = {"epochs": direct.epochs, "valid_elbo": direct.valid_elbo}
        words = captions.elbo_by_epoch(data, self.direct if direct else None)
        return Made("ELBO by epoch", words, figures.elbo_by_epoch(data, direct), numbers)

    # files -------------------------------------------------------------------------------------------------

    def _rows(self, count: int) -> Tensor:
        return validation_rows(self.images, count, self.subject.run.architecture.generative.likelihood, _device(self.subject))

    def _write(self, name: str, made: Made) -> None:
        png = style.save(made.figure, self.folder / f"{name}.png")
        self.entries.append(Entry(made.title, png, f"{made.caption} [{self._origin()}]", made.table))
        self.numbers[name] = {"file": png.name, "caption": made.caption, "data": made.numbers}
        companions = {"direct": self.direct, "landscape": self.z2}
        report = {
            "made": self.made_by,
            "checkpoint": self.subject.provenance,
            **{role: subject.provenance for role, subject in companions.items() if subject},
            "figures": self.numbers,
        }
        write_json(self.folder / "report.json", report)
        facts = {
            "checkpoint": self.subject,
            **{role: subject for role, subject in companions.items() if subject},
            "data": f"{self.subject.run.data.name}, {self.images.kind}, sha256 {self.images.sha256[:16]}…",
            **self.made_by,
        }
        write_text(self.folder / "index.html", page(f"Iterative inference: {self.subject.run.name}", facts, self.entries))

    def _origin(self) -> str:
        return f"{self.subject}; commit {self.made_by['commit']}; {self.made_by['date']}"


def _within(effort: Effort, valid: int) -> Effort:
    return replace(effort, race=replace(effort.race, rows=max(1, min(effort.race.rows, valid // 2))))


def _device(subject: Subject) -> torch.device:
    return next(subject.model.parameters()).device
