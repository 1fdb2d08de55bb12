"""Grey images under the likelihoods that take intensities as they are: trained, measured and exported without a draw of 0 or 1."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from training import evaluate as evaluation
from training.config import RunConfig
from training.data.catalogue import load
from training.evaluate import Effort, evaluate
from training.export_static import describe_static
from training.loop import Trainer
from training.report.subject import Subject, validation_rows
from training.run_loop import fabric_for

LIKELIHOODS = ("gaussian", "quantised_gaussian")


def grey(run: RunConfig, likelihood: str) -> RunConfig:
    architecture = replace(run.architecture, generative=replace(run.architecture.generative, likelihood=likelihood))
    return replace(run, name=likelihood, architecture=architecture, epochs=2)


@pytest.fixture(scope="module", params=LIKELIHOODS)
def folder(request: pytest.FixtureRequest, tiny_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    Trainer(grey(tiny_run, request.param), folder, fabric_for("cpu")).fit()
    return folder


def test_an_update_sees_intensities(tiny_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(grey(tiny_run, "gaussian"), tmp_path, fabric_for("cpu"))
    seen, plain = [], trainer.gradients
    monkeypatch.setattr(trainer, "gradients", lambda x, *rest: seen.append(x) or plain(x, *rest))
    trainer.update(torch.arange(16))
    assert torch.equal(seen[0], torch.as_tensor(trainer.images.train[:16]).float() / 255)


def test_figures_and_report_are_about_the_same_grey_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "optimum", lambda generative, q, *rest: q)
    seen: list[Tensor] = []
    monkeypatch.setattr(evaluation.Evaluator, "step_ms", lambda self: seen.append(self.x) or 0.0)
    subject = Subject.load(folder)
    likelihood = subject.run.architecture.generative.likelihood
    images = load(subject.run.data.name)
    effort = Effort(rows=16, samples=2, importance_rows=4, importance_samples=10, gap_rows=4, gap_samples=10, seeds=2, seed_rows=4)
    found = evaluate(subject.model, subject.run, subject.facts, effort, None, quiet=True)
    assert math.isfinite(found.elbo[-1])
    assert torch.equal(seen[0], torch.as_tensor(images.valid[:16]).float() / 255)
    assert torch.equal(seen[0], validation_rows(images, 16, likelihood, torch.device("cpu")))


def test_the_card_says_what_a_pixel_is_and_the_reference_is_grey(folder: Path) -> None:
    subject = Subject.load(folder)
    described = describe_static(subject.model, subject.run, rows=8, samples=1, data_root=None, quiet=True)
    x, likelihood = described.card["x"], described.card["likelihood"]
    assert likelihood.parameters == ("mu", "log_sigma")
    assert (x.minimum, x.maximum) == (0.0, 1.0)
    assert "grey values in [0, 1]" in x.description
    assert {"gaussian": "log density", "quantised_gaussian": "log mass"}[likelihood.name] in x.units
    inputs, outputs = described.reference["score"]
    assert ((inputs["x"] > 0) & (inputs["x"] < 1)).any()
    assert all(np.isfinite(value).all() for value in outputs.values())
