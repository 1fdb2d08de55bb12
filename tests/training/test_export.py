"""checkpoint -> artifact, from end to end on a tiny model: what is written opens, agrees, and holds its weights once."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.architecture import Architecture, IterativeArchitecture, VAEArchitecture
from models.artifact import (
    CARD,
    REFERENCE,
    WEIGHTS,
    Artifact,
    ArtifactError,
    Signer,
    list_versions,
    parity_error,
    write_reference,
)
from models.catalogue import build
from models.programs import static_programs
from tests.training.tiny_export import FIGURES, SECRET, moving, tiny_export
from training import export as exporting
from training.checkpoint import load_static
from training.commit import git
from training.config import RunConfig
from training.data.errors import DataError
from training.export import export
from training.export_files import ExportError, check_parity, run_onnx, run_torchscript
from training.export_static import describe_static
from training.export_static import reference as _reference
from training.runs.mnist import ENCODINGS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_export(tmp_path_factory)[0]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_export(tmp_path_factory)[1]


def test_the_artifact_opens_and_its_card_describes_the_model(artifact: Path, tiny_run: RunConfig) -> None:
    card = Artifact.open(artifact, Signer(secret=SECRET)).card
    assert [(name, version) for name, version, _ in list_versions(artifact.parents[1])] == [("tiny", "1")]
    assert (card.name, card.version, card.family) == ("tiny", "1", "static")
    assert (card.x.shape, card.x.minimum, card.x.maximum) == ((784,), 0.0, 1.0)
    assert (card.likelihood.name, card.likelihood.parameters) == ("bernoulli", ("logits",))
    assert [(level.name, level.size) for level in card.levels] == [("q0", 4)]
    assert card.iterative
    assert (card.trained_steps, card.max_steps, card.samples, card.antithetic) == (2, 128, 2, True)
    assert card.encoding == ENCODINGS
    assert set(card.programs) == {"init", "step", "score", "decode", "posterior_sample", "prior_sample", "sample_x"}
    assert card.curve.rows == 24
    assert len(card.curve.elbo) == len(card.curve.steps) == len(card.quantiles.elbo)
    assert all(tuple(sorted(row)) == row for row in card.quantiles.elbo)
    assert card.metrics == FIGURES
    assert card.provenance["epoch"] == 2
    assert card.provenance["data"]["name"] == tiny_run.data.name
    assert len(card.provenance["data"]["sha256"]) == 64


def test_every_engine_format_reproduces_the_reference(artifact: Path) -> None:
    opened = Artifact.open(artifact)
    weights = {name: torch.from_numpy(value) for name, value in opened.weights().items()}
    reference = opened.reference()
    assert set(reference) == set(opened.card.programs)
    for name, spec in opened.card.programs.items():
        inputs, outputs = reference[name]
        assert all(value.dtype == np.float64 for value in outputs.values())
        arrays = [inputs[tensor.name] for tensor in spec.inputs]
        for values in (
            run_torchscript(opened.file(spec.files["torchscript"]), weights, arrays),
            run_onnx(opened.file(spec.files["onnx"]), arrays),
        ):
            for tensor, value in zip(spec.outputs, values, strict=True):
                assert parity_error(value, outputs[tensor.name]) <= 1e-4, (name, tensor.name)


def test_the_reference_holds_a_hidden_half_and_a_posterior_some_steps_on(artifact: Path) -> None:
    inputs, _ = Artifact.open(artifact).reference()["step"]
    assert float(inputs["mask"][0].sum()) == 392
    assert float(np.abs(inputs["q0.mu"]).min()) > 0


def test_graphs_and_reference_add_less_than_a_third_to_real_weights(artifact: Path, tmp_path: Path) -> None:
    """Graphs hold no weights (test_tracing), so those of the tiny model are as large as those of the 2×512 one."""
    architecture = Architecture(VAEArchitecture(), IterativeArchitecture(encodings=ENCODINGS))
    model = moving(build(architecture, seed=0))
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    write_reference(tmp_path, _reference(model, (torch.rand(4, 784, generator=torch.Generator().manual_seed(0)) < 0.2).float()))
    graphs = sum(file.stat().st_size for file in artifact.iterdir() if file.suffix in (".pt", ".onnx", ".json"))
    total = weights + graphs + (tmp_path / REFERENCE).stat().st_size
    assert total <= 1.3 * weights, f"{total / weights:.2f} × the weights"


def test_a_version_is_never_overwritten(checkpoint: Path, artifact: Path) -> None:
    before = (artifact / CARD).read_bytes()
    with pytest.raises(FileExistsError, match="a version never changes"):
        export(checkpoint, artifact.parents[1], "tiny", "1", rows=8, samples=1, quiet=True)
    assert (artifact / CARD).read_bytes() == before


@pytest.mark.parametrize("kind", ["torchscript", "onnx"])
def test_parity_is_refused_to_a_program_that_computes_something_else(kind: str, checkpoint: Path, artifact: Path, tmp_path: Path) -> None:
    """A decoder in the place of another model's: same names, same shapes, other numbers."""
    folder = shutil.copytree(artifact, tmp_path / "tampered")
    model = exporting.load_weights(checkpoint)[0]
    served = static_programs(model)
    served = replace(served, programs={"prior_sample": served.programs["prior_sample"], "decode": served.programs["decode"]})
    reference = Artifact.open(artifact).reference()
    worst = check_parity(folder, served.programs, reference)
    assert set(worst) == {"torchscript", "onnx"}
    assert max(worst.values()) <= 1e-4
    if kind == "torchscript":
        script = torch.jit.load(str(folder / "prior_sample.pt"))
        tampered = torch.jit.script(_Scaled(script))
        torch.jit.save(tampered, str(folder / "prior_sample.pt"))
    else:
        import onnx

        proto = onnx.load(str(folder / "prior_sample.onnx"), load_external_data=False)
        (node,) = [node for node in proto.graph.node if proto.graph.output[0].name in node.output]
        result, node.output[0] = node.output[0], "plain"
        proto.graph.node.append(onnx.helper.make_node("Neg", ["plain"], [result]))
        onnx.save(proto, str(folder / "prior_sample.onnx"))
    with pytest.raises(ExportError, match=f"{kind} prior_sample: output z0 differs from the float64 model by"):
        check_parity(folder, served.programs, reference)


class _Scaled(torch.nn.Module):
    def __init__(self, script: torch.jit.ScriptModule):
        super().__init__()
        self.script = script

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        (z,) = self.script(noise)
        return 1.01 * z


def test_an_export_that_disagrees_leaves_nothing_behind(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disagree(*args: object) -> None:
        raise ExportError("onnx step: output q0.mu differs")

    monkeypatch.setattr(exporting, "write_programs", lambda folder, *parts: (folder / WEIGHTS).write_bytes(b""))
    monkeypatch.setattr(exporting, "check_parity", disagree)
    with pytest.raises(ExportError):
        export(checkpoint, tmp_path, "tiny", "1", rows=8, samples=1, quiet=True)
    assert not list(tmp_path.iterdir())
    assert not list(list_versions(tmp_path))


def test_an_altered_export_does_not_open(artifact: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(artifact, tmp_path / "altered")
    graph = bytearray((folder / "step.onnx").read_bytes())
    graph[len(graph) // 2] ^= 1
    (folder / "step.onnx").write_bytes(bytes(graph))
    with pytest.raises(ArtifactError, match=r"step\.onnx does not have the sha256"):
        Artifact.open(folder)


@pytest.mark.parametrize("facts", [{}, {"epoch": 1, "weights_sha256": "0" * 64}])
def test_figures_of_other_weights_are_left_out_of_the_card_and_that_is_said(
    facts: dict[str, Any], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The figures of an older checkpoint once went into the card of a newer one."""
    (tmp_path / "evaluation.json").write_text(json.dumps({**FIGURES, "facts": facts}))
    assert exporting._metrics(tmp_path, load_static(checkpoint)[2]) == {}
    said = capsys.readouterr().err
    assert str(tmp_path / "evaluation.json") in said
    assert ("epoch 1" if facts else "it does not say which") in said


def test_figures_that_are_not_finite_are_left_out(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = load_static(checkpoint)[2]
    written = {"log_px": math.nan, "optimum": None, "seed_spread": 0.2, "facts": loaded}
    (tmp_path / "evaluation.json").write_text(json.dumps(written))
    assert exporting._metrics(tmp_path, loaded) == {"seed_spread": 0.2}
    for damaged in ("{", "[]", '{"log_px": "much"}', '{"log_px": 1, "facts": 3}'):
        (tmp_path / "evaluation.json").write_text(damaged)
        assert exporting._metrics(tmp_path, loaded) == {}
        assert "not an evaluation" in capsys.readouterr().err


def test_data_that_changed_are_refused_and_nothing_is_made(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "run")
    described = json.loads((folder / "checkpoint.json").read_text())
    (folder / "checkpoint.json").write_text(json.dumps({**described, "data_sha256": "0" * 64}))
    with pytest.raises(DataError, match=r"tiny was trained on another npz:.* \(sha256 000000000000…\)"):
        export(folder, tmp_path / "made", "tiny", "1", rows=8, samples=1, quiet=True)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(("name", "version"), [("../escaped", "1"), ("a/b", "1"), ("", "1"), ("tiny", ".1"), ("tiny", "1\n")])
def test_a_name_that_no_card_may_have_is_refused_before_anything_is_made(name: str, version: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="--name" if name != "tiny" else "--version"):
        export(tmp_path / "no checkpoint", tmp_path / "made", name, version)
    assert not list(tmp_path.iterdir())


def test_without_git_the_commit_is_unknown(checkpoint: Path, tiny_run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*args: object, **options: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", absent)
    assert git("rev-parse", "HEAD") == ""
    model, run, facts = load_static(checkpoint)
    described = describe_static(model, run, rows=1, samples=1, data_root=None, quiet=True)
    provenance = exporting._provenance(run, {**facts, "data_sha256": "1" * 64}, described)
    assert provenance["commit"] == "unknown"
    assert provenance["data"]["sha256"] == "1" * 64  # of the data that it was trained on
