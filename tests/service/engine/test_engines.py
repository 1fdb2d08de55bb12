"""One contract for every engine: the reference's numbers, rows that do not see each other, slots that keep what they hold."""

import shutil

import numpy as np
import pytest

from models.artifact import Artifact, ArtifactError, write_card
from service.engine.base import Engine
from service.scheduler.job import Ask, JobResult
from service.scheduler.scheduler import Scheduler
from tests.service.scheduler.support import Clock, job, run

LIMIT = 1e-5
"""Of a row in a batch against the row alone, |a − b| / max(1, |b|) (architecture.md, section 7)."""


def make(kind, artifact, **kwargs) -> Engine:
    if kind.startswith("onnx"):
        pytest.importorskip("onnxruntime")
        from service.engine.onnx import OnnxEngine

        return OnnxEngine(artifact, **({"threads": 3} if kind == "onnx, 3 threads" else {}), **kwargs)
    pytest.importorskip("torch")
    if kind != "torchscript":
        from service.engine.torchscript_device import TorchScriptDeviceEngine

        return TorchScriptDeviceEngine(artifact, device=kind, **kwargs)
    from service.engine.torchscript import TorchScriptEngine

    return TorchScriptEngine(artifact, **kwargs)


KINDS = ["onnx", "onnx, 3 threads", "torchscript", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
"""An engine, or the device of the device engine; on "cpu" that has the slots, buckets and keys of a GPU, and no graphs."""


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def engine(kind, artifact):
    made = make(kind, artifact)
    yield made
    made.close()


def inputs(engine, program, rows, samples=3, seed=0):
    rng = np.random.default_rng(seed)
    sizes = {"rows": rows, "samples": samples}
    arrays = {t.name: rng.standard_normal([sizes.get(n, n) for n in t.shape]).astype(t.dtype) for t in engine.card.programs[program].inputs}
    for name in ("x", "mask"):
        if name in arrays:
            arrays[name] = (arrays[name] > 0).astype(np.float32)
    return arrays


def off(a, b):
    return float(np.max(np.abs(a - b) / np.maximum(1, np.abs(b))))


def test_every_program_agrees_with_the_float64_reference(engine, artifact):
    assert set(engine.parity) == set(artifact.card.programs)
    assert max(engine.parity.values()) <= 1e-4


@pytest.mark.parametrize("rows", [1, 2, 7, 16])
def test_a_row_in_a_batch_equals_the_row_alone_at_any_place_and_in_every_program(engine, rows):
    for program, spec in engine.card.programs.items():
        arrays = inputs(engine, program, rows)
        together = engine.run(program, arrays)
        assert list(together) == [tensor.name for tensor in spec.outputs]
        for row in range(rows):
            alone = engine.run(program, {name: value[row : row + 1] for name, value in arrays.items()})
            for name, value in alone.items():
                assert off(value[0], together[name][row]) <= LIMIT, (program, name)


def test_outputs_have_the_shapes_and_types_of_the_card(engine):
    for program, spec in engine.card.programs.items():
        outputs = engine.run(program, inputs(engine, program, 5, 2))
        for tensor in spec.outputs:
            assert outputs[tensor.name].shape == tuple({"rows": 5, "samples": 2}.get(n, n) for n in tensor.shape), (program, tensor.name)
            assert outputs[tensor.name].dtype == tensor.dtype


def test_rows_refined_in_slots_equal_rows_refined_by_hand(engine):
    if not engine.card.iterative:
        pytest.skip("a direct model does not refine")
    engine.allocate(12)
    slots = np.array([9, 3, 0, 11], np.intp)
    arrays = inputs(engine, "init", 4)
    engine.load_rows(slots, arrays)
    engine.run_rows("init", slots, {})
    by_hand = {**arrays, **engine.run("init", arrays)}
    for k in range(3):
        noise = {"noise0": inputs(engine, "step", 4, seed=k)["noise0"]}
        norm = engine.run_rows("step", slots, noise)["grad_norm"]
        step = engine.run("step", {**by_hand, **noise})
        assert np.array_equal(norm, step.pop("grad_norm"))
        by_hand.update(step)
    kept = engine.read_rows(slots, [tensor.name for tensor in engine.card.carry])
    assert all(np.array_equal(value, by_hand[name]) for name, value in kept.items())


@pytest.mark.parametrize("other", KINDS[1:])
def test_all_engines_give_the_same_answers_through_the_scheduler(artifact, other):
    rng = np.random.default_rng(0)
    x = (rng.random((3, artifact.card.x.size)) < 0.4).astype(np.float32)
    ask = Ask(samples=4, trace=artifact.card.iterative, importance_samples=50, z=2, mean=True)
    answers = []
    for kind in ("onnx", other):
        scheduler = Scheduler(clock=Clock())
        scheduler.add_model("m", make(kind, artifact))
        answers.append(run(scheduler, job(3, 5, x=x, ask=ask))[0])
    a, b = answers
    assert isinstance(a, JobResult)
    for name in ("elbo", "log_px", "mean", "kl"):
        assert off(getattr(a, name), getattr(b, name)) <= 1e-4
    assert a.stop_reason == b.stop_reason
    assert a.steps_used.tolist() == [5 if artifact.card.iterative else 0] * 3


@pytest.fixture
def copy(artifact, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(artifact.path, folder)
    return folder


def reopened(folder, card):
    """The artifact after somebody who may write cards changed its files."""
    write_card(folder, card.model_copy(update={"files": {}}))
    return Artifact.open(folder)


def test_wrong_weights_are_refused_by_name_of_program_and_output(kind, copy, artifact):
    raw = bytearray((copy / "weights.safetensors").read_bytes())
    data = 8 + int.from_bytes(raw[:8], "little")
    raw[data:] = np.full((len(raw) - data) // 4, 0.1, np.float32).tobytes()
    (copy / "weights.safetensors").write_bytes(raw)
    with pytest.raises(ArtifactError, match=r"program '\w+', output '[\w.]+': differs from the reference by"):
        make(kind, reopened(copy, artifact.card))


def test_a_program_that_is_not_one_is_refused(kind, copy, artifact):
    (copy / artifact.card.programs["decode"].files["onnx" if kind.startswith("onnx") else "torchscript"]).write_bytes(b"not a program")
    with pytest.raises(ArtifactError, match="cannot load"):
        make(kind, reopened(copy, artifact.card))


def test_an_artifact_without_this_format_is_refused(kind, copy, artifact):
    decode = artifact.card.programs["decode"].model_copy(update={"files": {}})
    card = artifact.card.model_copy(update={"programs": {**artifact.card.programs, "decode": decode}})
    with pytest.raises(ArtifactError, match="'decode' has no"):
        make(kind, reopened(copy, card))


def test_a_card_that_lists_other_inputs_than_the_program_has_is_refused(copy, artifact):
    pytest.importorskip("onnxruntime")
    decode = artifact.card.programs["decode"].model_copy(update={"inputs": (*artifact.card.programs["decode"].inputs,) * 2})
    card = artifact.card.model_copy(update={"programs": {**artifact.card.programs, "decode": decode}})
    with pytest.raises(ArtifactError, match="the card says 2 and"):
        make("onnx", reopened(copy, card))
