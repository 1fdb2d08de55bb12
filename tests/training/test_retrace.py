"""TorchScript made again: the same artifact, still held to its reference."""

from pathlib import Path

import pytest

from models.artifact import Artifact
from service.engine.torchscript import TorchScriptEngine
from training.retrace import retrace

SHIPPED = Path(__file__).parents[2] / "checkpoints"


@pytest.mark.parametrize("name", ["mnist-iterative", pytest.param("speech-filter", marks=pytest.mark.slow)])
def test_a_retraced_artifact_is_whole_and_computes_the_reference(name, tmp_path):
    made = Artifact.open(retrace(SHIPPED / name / "1", tmp_path))
    shipped = Artifact.open(SHIPPED / name / "1")
    assert made.card.curve == shipped.card.curve
    assert made.card.files["weights.safetensors"] == shipped.card.files["weights.safetensors"]
    assert max(TorchScriptEngine(made).parity.values()) <= 1e-4
    with pytest.raises(FileExistsError, match="a version never changes"):
        retrace(SHIPPED / name / "1", tmp_path)
