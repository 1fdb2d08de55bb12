"""What a report is about: a checkpoint with its training log, and the validation rows it is measured on.

Shapes: B rows, X size of x.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.catalogue import LatentModel
from training.checkpoint import load_static
from training.commit import git
from training.config import RunConfig
from training.data.binarise import observe
from training.data.images import Images
from training.evaluate import BINARISE_SEED
from training.records import read_epochs

LOG = "log.jsonl"


class ReportError(Exception):
    """A figure was asked of a checkpoint that cannot give it."""


@dataclass(frozen=True)
class Subject:
    """A checkpoint. `log` holds one entry an epoch, also of the runs it began from; empty where the checkpoint came without its log."""

    folder: Path
    model: LatentModel
    run: RunConfig
    facts: dict[str, Any]
    log: list[dict[str, Any]]

    @staticmethod
    def load(folder: Path) -> Subject:
        """Raises CheckpointError if there is no checkpoint in the folder."""
        model, run, facts = load_static(folder)
        return Subject(folder, model, run, facts, read_log(folder, run))

    @property
    def provenance(self) -> dict[str, Any]:
        """What a caption needs to say where a figure came from."""
        return {
            "name": self.run.name,
            "epoch": self.facts.get("epoch"),
            "epochs_planned": self.run.epochs,
            "trained_steps": self.run.refinement.steps,
            "samples": self.run.refinement.samples,
            "antithetic": self.run.refinement.antithetic,
            "data": self.run.data.name,
            "data_sha256": self.facts.get("data_sha256"),
        }

    def __str__(self) -> str:
        planned = "" if self.run.parent else f" of {self.run.epochs}"  # a run that goes on counts its parent's epochs too
        return f"{self.run.name}, epoch {self.facts.get('epoch', '?')}{planned}"


def read_log(folder: Path, run: RunConfig) -> list[dict[str, Any]]:
    """The log of a run and, before it, of those it began from (`parent`), their epochs counted on. Every entry names its `run`.

    Looked for beside the weights, one folder up (in a run's folder), and in `training/NAME` beside an artifact's versions (as shipped);
    a parent's beside that of its child. It begins with the earliest phase that is there without a gap; empty if the run's own is missing.
    """
    candidates = (folder, folder.parent, folder.parent / "training" / run.name)
    home = next((candidate for candidate in candidates if (candidate / LOG).exists()), None)
    if home is None:
        return []
    phases, name = [_entries(home / LOG)], run.parent
    names = [run.name]
    while name is not None and (home.parent / name / LOG).exists():
        phases.insert(0, _entries(home.parent / name / LOG))
        names.insert(0, name)
        name = json.loads((home.parent / name / "run.json").read_text())["run"].get("parent")
    joined, before = [], 0
    for name, entries in zip(names, phases, strict=True):
        joined += [entry | {"epoch": before + entry["epoch"], "run": name} for entry in entries]
        before += entries[-1]["epoch"] if entries else 0
    return joined


def _entries(log: Path) -> list[dict[str, Any]]:
    """A line cut short by a kill is left out; of an epoch that was logged twice the later line counts."""
    entries = {entry["epoch"]: entry for entry in read_epochs(log)}
    return [entries[epoch] for epoch in sorted(entries)]


def validation_rows(images: Images, count: int, likelihood: str, device: torch.device) -> Tensor:
    """The first `count` validation rows as x (B, X): binarised with the seed of `elbow-train evaluate`, so they are the same rows."""
    pixels = torch.as_tensor(images.valid[:count]).to(device)
    return observe(pixels, images.kind, likelihood, torch.Generator(device).manual_seed(BINARISE_SEED))


def one_row_per_class(images: Images, count: int) -> list[int]:
    """Indices of validation rows to show: the first of each class, in the order of the classes; without labels the first `count`."""
    if images.valid_labels is None:
        return list(range(min(count, len(images.valid))))
    _, first = np.unique(images.valid_labels, return_index=True)
    return [int(row) for row in first[:count]]


def made_by() -> dict[str, Any]:
    """When, by which code and how: UTC date, commit of this code (with + if files had changed), torch version, CPU threads."""
    commit = git("rev-parse", "--short=12", "HEAD")
    changed = bool(commit) and bool(git("status", "--porcelain", "--untracked-files=no", "--", ":/models", ":/training"))
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": (commit + ("+" if changed else "")) or "unknown",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
