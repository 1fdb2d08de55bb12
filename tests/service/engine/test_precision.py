"""A further precision of an artifact: what it must keep to be served, and what happens where it cannot be had."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from models.artifact import Artifact, ArtifactError, write_card
from service.building import build_engine, build_preferred
from service.engine.onnx import OnnxEngine
from service.engine.parity import PrecisionRefused, verify_precision
from service.scheduler.job import Ask, JobResult
from service.scheduler.scheduler import Scheduler
from tests.int8 import needs_exact_int8
from tests.service.scheduler.support import Clock, job, run

CHECKPOINTS = Path(__file__).parents[3] / "checkpoints"
SHIPPED = CHECKPOINTS / "mnist-iterative" / "1"


@pytest.fixture(scope="module")
def shipped() -> Artifact:
    return Artifact.open(SHIPPED)


@pytest.fixture(scope="module", params=[1, 2], ids=["one thread", "two threads"])
def int8(request: pytest.FixtureRequest, shipped: Artifact) -> OnnxEngine:
    return OnnxEngine(shipped, threads=request.param, precision="int8")


def arrays(engine: OnnxEngine, program: str, rows: int, samples: int = 2) -> dict[str, np.ndarray]:
    rng, sizes = np.random.default_rng(rows), {"rows": rows, "samples": samples}
    specs = engine.card.programs[program].inputs
    made = {t.name: rng.standard_normal([sizes.get(n, n) for n in t.shape]).astype(t.dtype) for t in specs}
    return made | {name: (made[name] > 0).astype(np.float32) for name in ("x", "mask") if name in made}


@needs_exact_int8
@pytest.mark.parametrize("rows", [1, 2, 7, 64, 100])
def test_a_row_has_the_same_bits_in_any_batch(int8: OnnxEngine, rows: int) -> None:
    for program in ("init", "step"):
        given = arrays(int8, program, rows)
        together = int8.run(program, given)
        for row in range(0, rows, 1 + rows // 7):
            alone = int8.run(program, {name: value[row : row + 1] for name, value in given.items()})
            assert all(np.array_equal(value[0], together[name][row]) for name, value in alone.items()), (program, row)


@needs_exact_int8
def test_an_answer_does_not_depend_on_who_shares_the_batch(int8: OnnxEngine) -> None:
    """Through the scheduler, all the way from x to λ after ten steps, beside rows of quite another size."""
    rng = np.random.default_rng(0)
    x = (rng.random((3, 784)) < 0.2).astype(np.float32)
    others = rng.random((40, 784), dtype=np.float32)

    def answers(*jobs: object) -> list[object]:
        scheduler = Scheduler(clock=Clock())
        scheduler.add_model("m", int8)
        return run(scheduler, *jobs)

    mine = {"x": x, "seed": 5, "ask": Ask(samples=4, trace=True)}
    (alone,) = answers(job(3, 10, **mine))
    _, shared = answers(job(40, 20, x=others), job(3, 10, **mine))
    assert isinstance(alone, JobResult)
    assert isinstance(shared, JobResult)
    assert all(np.array_equal(value, shared.carry[name]) for name, value in alone.carry.items())


@needs_exact_int8
def test_a_row_that_turns_non_finite_keeps_its_posterior_and_says_so(int8: OnnxEngine) -> None:
    given = arrays(int8, "step", 4)
    given["q0.mu"][1, 40] = np.nan
    out = int8.run("step", given)
    assert not np.isfinite(out["grad_norm"][1])
    assert np.isfinite(out["grad_norm"][[0, 2, 3]]).all()
    assert np.array_equal(out["q0.log_sigma"][1], given["q0.log_sigma"][1])


@needs_exact_int8
def test_programs_that_measure_stay_float32_and_are_held_to_parity(int8: OnnxEngine, shipped: Artifact) -> None:
    assert set(int8.parity) == set(shipped.card.programs) - {"init", "step"}
    assert max(int8.parity.values()) <= 1e-4
    lost, allowed = verify_precision(int8, shipped)
    assert lost <= allowed < 0.1
    float32 = OnnxEngine(shipped)
    given = arrays(int8, "score", 5)
    assert all(np.array_equal(value, float32.run("score", given)[name]) for name, value in int8.run("score", given).items())
    given = arrays(int8, "step", 5)
    assert not np.array_equal(int8.run("step", given)["q0.mu"], float32.run("step", given)["q0.mu"])


def rewritten(folder: Path, shipped: Artifact, change) -> Artifact:
    """The shipped artifact with another int8 `step`."""
    onnx = pytest.importorskip("onnx")
    shutil.copytree(shipped.path, folder)
    change(onnx, folder)
    write_card(folder, shipped.card.model_copy(update={"files": {}}))
    return Artifact.open(folder)


def coarse(onnx, folder: Path) -> None:
    """A sixteenth of the values."""
    proto = onnx.load(str(folder / "step.int8.onnx"), load_external_data=False)
    (unit,) = [one for one in proto.graph.initializer if one.name == "int8_unit"]
    unit.CopyFrom(onnx.numpy_helper.from_array(np.float32(8 / 127), "int8_unit"))
    (folder / "step.int8.onnx").write_bytes(proto.SerializeToString())


def by_array(onnx, folder: Path) -> None:
    """One scale for all rows: cheap enough in nats, and the neighbours are in it."""
    from training.quantise import per_row, to_int8

    proto = onnx.load(str(folder / "step.onnx"), load_external_data=False)
    to_int8(proto, per_row)
    (rows,) = [one for one in proto.graph.initializer if one.name == "int8_rows"]
    rows.CopyFrom(onnx.numpy_helper.from_array(np.array([-2, -1]), "int8_rows"))
    (folder / "step.int8.onnx").write_bytes(proto.SerializeToString())


def test_a_program_that_loses_more_than_its_card_says_is_refused(shipped: Artifact, tmp_path: Path) -> None:
    artifact = rewritten(tmp_path / "1", shipped, coarse)
    spec = artifact.card.precisions["int8"]
    allowed = spec.cost_nats + 3 * spec.cost_std / 32**0.5
    with pytest.raises(PrecisionRefused, match=rf"int8 on engine 'onnx': loses \d+\.\d+ nats on 32 reference rows, may lose {allowed:.3f}"):
        OnnxEngine(artifact, precision="int8")


def test_a_program_whose_rows_see_each_other_is_refused(shipped: Artifact, tmp_path: Path) -> None:
    artifact = rewritten(tmp_path / "1", shipped, by_array)
    with pytest.raises(PrecisionRefused, match=r"'step' of a row differs by .* when it shares a batch"):
        OnnxEngine(artifact, precision="int8")


def test_where_it_cannot_be_had_a_model_is_served_in_float32_and_the_log_says_why(
    shipped: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cases = [
        (rewritten(tmp_path / "1", shipped, coarse), "onnx", "loses"),
        (Artifact.open(CHECKPOINTS / "jsb-filter" / "1"), "onnx", "jsb-filter/1: its card does not offer int8"),
        (shipped, "torchscript", "int8 needs ONNX Runtime on the CPU"),
    ]
    for artifact, engine, reason in cases:
        if engine == "torchscript":
            pytest.importorskip("torch")
        caplog.clear()
        made = build_preferred("int8", artifact, engine=engine, threads=1)
        assert (made.name, made.precision) == (engine, "float32")
        (record,) = [record for record in caplog.records if record.message == "served in float32"]
        assert reason in record.__dict__["reason"]
        with pytest.raises(PrecisionRefused, match=reason):
            build_engine(artifact, engine, 1, precision="int8")


@needs_exact_int8
def test_where_it_can_be_had_nothing_is_said(shipped: Artifact, caplog: pytest.LogCaptureFixture) -> None:
    assert build_preferred("int8", shipped, engine="auto", threads=1).precision == "int8"
    assert not caplog.records


@pytest.mark.skipif("not __import__('tests.int8').int8.saturates()", reason="products of int8 are exact on this processor")
def test_a_processor_that_saturates_serves_the_shipped_model_in_float32(shipped: Artifact) -> None:
    with pytest.raises(PrecisionRefused, match="loses"):
        OnnxEngine(shipped, precision="int8")
    assert build_preferred("int8", shipped, engine="auto", threads=1).precision == "float32"


def test_an_artifact_without_its_reference_rows_is_refused(shipped: Artifact, tmp_path: Path) -> None:
    artifact = rewritten(tmp_path / "1", shipped, lambda onnx, folder: (folder / "elbo.safetensors").unlink())
    with pytest.raises(ArtifactError, match=r"elbo\.safetensors is not listed in the card"):
        OnnxEngine(artifact, precision="int8")
    assert OnnxEngine(artifact).precision == "float32"
