"""int8 beside float32: measured before it is offered, small beside the weights it shares, and refused where it costs too much."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from models.artifact import CARD, ELBO_REFERENCE, WEIGHTS, Artifact, Signer, write_card
from tests.int8 import needs_exact_int8
from tests.training.tiny_export import tiny_export
from training import precision
from training.__main__ import main
from training.checkpoint import CheckpointError
from training.export import export
from training.export_files import ExportError
from training.precision import quantise

Capture = pytest.CaptureFixture[str]
SHIPPED = Path(__file__).parents[2] / "checkpoints"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_export(tmp_path_factory)[1]


@pytest.fixture(scope="module")
def plain(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As exported without int8."""
    folder = tmp_path_factory.mktemp("plain") / "1"
    folder.mkdir()
    artifact = Artifact.open(exported)
    for name in artifact.card.files:
        if "int8" not in name and name != ELBO_REFERENCE:
            shutil.copyfile(artifact.file(name), folder / name)
    write_card(folder, artifact.card.model_copy(update={"files": {}, "precisions": {}}))
    return folder


@needs_exact_int8
def test_a_quantised_artifact_is_the_same_artifact_with_int8_offered(plain: Path, tmp_path: Path) -> None:
    signer = Signer(secret=b"secret")
    made, before = Artifact.open(quantise(plain, tmp_path, rows=32, signer=signer), signer), Artifact.open(plain)
    assert made.path == tmp_path / "tiny" / "1"
    added = made.card.files.keys() - before.card.files.keys()
    assert added == {"init.int8.onnx", "step.int8.onnx", "elbo.safetensors"}
    assert all(made.card.files[name] == spec for name, spec in before.card.files.items())
    assert made.card.model_copy(update={"files": {}, "precisions": {}}) == before.card.model_copy(update={"files": {}})
    spec = made.card.precisions["int8"]
    assert set(spec.programs) == {"init", "step"}
    assert (spec.rows, spec.samples) == (32, 20)
    assert -0.05 < spec.cost_nats <= 0.05
    assert spec.cost_std > 0
    with pytest.raises(FileExistsError, match="a version never changes"):
        quantise(plain, tmp_path, rows=8)


def test_what_it_is_held_to_is_the_float64_elbo_after_the_trained_steps(plain: Path, tmp_path: Path) -> None:
    arrays, elbo = Artifact.open(quantise(plain, tmp_path, rows=32)).elbo_reference()
    rows, steps, samples, latent = 32, 2, 2, 4
    assert elbo.dtype == np.float64
    assert arrays["x"].shape == (rows, 784)
    assert arrays["refine0"].shape == (steps, rows, samples, latent)
    assert arrays["measure0"].shape == (rows, 8, latent)
    assert np.array_equal(arrays["refine0"][:, :, 0], -arrays["refine0"][:, :, 1])
    assert elbo.shape == (rows,)
    assert np.all(elbo < 0)


def test_an_export_offers_it_when_asked(exported: Path) -> None:
    spec = Artifact.open(exported).card.precisions["int8"]
    assert (spec.rows, spec.samples) == (24, 2)


def test_what_costs_too_much_is_not_offered_and_leaves_nothing(
    plain: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "MAX_COST_NATS", -1.0)
    with pytest.raises(ExportError, match=r"int8 costs -?0\.\d+ nats on 16 validation rows, more than -1.0: not offered"):
        quantise(plain, tmp_path, rows=16)
    assert not list(tmp_path.iterdir())
    assert main(["quantise", str(plain), "--to", str(tmp_path), "--rows", "16"]) == 1
    assert "not offered" in capsys.readouterr().err


def test_a_filter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a sequence model"):
        quantise(SHIPPED / "jsb-filter" / "1", tmp_path)
    with pytest.raises(ExportError, match="--int8: a filter's frame measures"):
        export(SHIPPED / "jsb-filter" / "1", tmp_path, "jsb", "1", int8=True)


@pytest.mark.parametrize("name", ["mnist-iterative", "mnist-direct"])
def test_the_shipped_int8_programs_are_what_this_code_makes_of_the_float_ones(name: str) -> None:
    """And hold no weights: these lie once in weights.safetensors."""
    onnx = pytest.importorskip("onnx")
    artifact = Artifact.open(SHIPPED / name / "1")
    for program, files in artifact.card.precisions["int8"].programs.items():
        proto = onnx.load(str(artifact.file(artifact.card.programs[program].files["onnx"])), load_external_data=False)
        precision.to_int8(proto)
        made = onnx.load(str(artifact.file(files["onnx"])), load_external_data=False)
        assert made == proto
        outside = [one for one in made.graph.initializer if one.external_data]
        assert {entry.value for one in outside for entry in one.external_data if entry.key == "location"} == {WEIGHTS}
        assert made.ByteSize() < 50_000
    assert (artifact.path / CARD).stat().st_size < 50_000
