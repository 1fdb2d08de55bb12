"""A tiny static model and its artifact, with int8 and signed: made once for all tests that only read it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.architecture import IterativeArchitecture
from models.artifact import WEIGHTS, Signer, sha256_of
from models.catalogue import LatentModel, build
from tests.made_once import made_once
from tests.training.conftest import four_by_four
from training.checkpoint import save_weights
from training.export import export
from training.runs.mnist import ENCODINGS

SECRET = b"secret"
FIGURES = {"log_px": -100.5, "optimum": -101.0, "seed_spread": 0.2}


def moving(model: LatentModel) -> LatentModel:
    """With heads away from zero, so that every step does something."""
    heads = model.inference.heads
    assert isinstance(heads, torch.nn.Linear)
    torch.nn.init.normal_(heads.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    return model.requires_grad_(False)


def tiny_export(factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The checkpoint, and the artifact: the only one of its repository."""
    folder = made_once(factory, "tiny-static", _make)
    return folder / "run", folder / "repository" / "tiny" / "1"


def _make(folder: Path) -> None:
    tiny_run = four_by_four()
    architecture = replace(tiny_run.architecture, inference=IterativeArchitecture(ENCODINGS, (16,)))
    run = replace(tiny_run, architecture=architecture)
    save_weights(folder / "run", moving(build(architecture, seed=0)), run, {"epoch": 2})
    measured = {"epoch": 2, "weights_sha256": sha256_of(folder / "run" / WEIGHTS)}
    (folder / "run" / "evaluation.json").write_text(json.dumps({**FIGURES, "name": "tiny", "facts": measured}))
    export(folder / "run", folder / "repository", "tiny", "1", rows=24, samples=2, int8=True, signer=Signer(secret=SECRET), quiet=True)
