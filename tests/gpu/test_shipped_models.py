"""The shipped models on a GPU, at every bucket, against their float64 references.

`make test-gpu` first makes their TorchScript again with the torch of the machine (runs/gpu-artifacts), and these tests take it.
The same checks run on the CPU at a few buckets, without graphs.
"""

from pathlib import Path

import numpy as np
import pytest

from models.artifact import Artifact, list_versions, parity_error
from service.noise import Keys
from service.scheduler.job import Ask, JobResult
from service.scheduler.scheduler import Scheduler
from tests.service.scheduler.support import job, run

torch = pytest.importorskip("torch")

from service.engine.torchscript_device import LARGEST_BUCKET, TorchScriptDeviceEngine  # noqa: E402

ROOT = Path(__file__).parents[2]
RETRACED = ROOT / "runs" / "gpu-artifacts"
SHIPPED = {name: path for name, _, path in list_versions(RETRACED if RETRACED.exists() else ROOT / "checkpoints")}
TOLERANCE = 1e-4
EVERY = [1 << power for power in range(LARGEST_BUCKET.bit_length())]
CASES = [("cpu", 1), ("cpu", 4), ("cpu", 32), *(pytest.param("cuda", bucket, marks=pytest.mark.gpu) for bucket in EVERY)]
REPEATED = 3
"""The second call of a shape captures its graph, the third is a plain replay."""


@pytest.fixture(scope="module")
def engines():
    """name, device -> an engine, made once."""
    made = {}

    def get(name, device):
        if (name, device) not in made:
            made[name, device] = TorchScriptDeviceEngine(Artifact.open(SHIPPED[name]), device)
            made[name, device].allocate(LARGEST_BUCKET if device != "cpu" else 64)
        return made[name, device]

    yield get
    for engine in made.values():
        engine.close()


@pytest.mark.parametrize(("device", "bucket"), CASES)
@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_every_program_agrees_with_the_reference_in_a_batch_of(engines, name, device, bucket):
    """The reference's rows, over and over, fill the batch; one row less where that is padded to the same bucket."""
    engine = engines(name, device)
    for program, (inputs, expected) in Artifact.open(SHIPPED[name]).reference().items():
        for rows in {bucket, max(bucket - 1, bucket // 2 + 1)}:
            which = np.arange(rows) % len(next(iter(inputs.values())))
            given = {t.name: inputs[t.name][which].astype(t.dtype) for t in engine.card.programs[program].inputs}
            for _ in range(REPEATED):
                outputs = engine.run(program, given)
            for output, value in expected.items():
                assert parity_error(outputs[output], value[which]) <= TOLERANCE, (program, output)


@pytest.mark.parametrize(("device", "bucket"), CASES)
def test_rows_in_slots_agree_with_the_reference_of_a_step(engines, device, bucket):
    """Gather and scatter inside the graph: every slot of a full batch, in an order of its own."""
    engine = engines("mnist-iterative", device)
    inputs, expected = Artifact.open(SHIPPED["mnist-iterative"]).reference()["step"]
    which = np.arange(bucket) % len(inputs["x"])
    slots = np.random.default_rng(0).permutation(bucket)
    noise = {"noise0": inputs["noise0"][which].astype(np.float32)}
    for _ in range(REPEATED):
        engine.load_rows(slots, {name: value[which] for name, value in inputs.items() if name != "noise0"})
        norm = engine.run_rows("step", slots, noise)["grad_norm"]
    assert parity_error(norm, expected["grad_norm"][which]) <= TOLERANCE
    for name, value in engine.read_rows(slots, ["q0.mu", "q0.log_sigma"]).items():
        assert parity_error(value, expected[name][which]) <= TOLERANCE


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_served_rows_are_those_of_the_host(device):
    """Through the scheduler, noise drawn on the device from seeds and steps alone."""
    pytest.importorskip("onnxruntime")
    from service.engine.onnx import OnnxEngine

    with np.load(ROOT / "tests/data/mnist_sample.npz") as sample:
        x = (sample["valid"].reshape(-1, 784)[:24] > 127).astype(np.float32)
    answers = []
    for engine in (
        OnnxEngine(Artifact.open(ROOT / "checkpoints/mnist-iterative/1")),
        TorchScriptDeviceEngine(Artifact.open(SHIPPED["mnist-iterative"]), device),
    ):
        scheduler = Scheduler(slots=32)
        scheduler.add_model("m", engine)
        answers.append(run(scheduler, job(24, 6, x=x, ask=Ask(samples=8, trace=True, importance_samples=40, z=2, mean=True)))[0])
    host, ours = answers
    assert isinstance(ours, JobResult)
    np.testing.assert_allclose(ours.elbo, host.elbo, atol=0.01)  # nats, after six steps of rounding otherwise
    np.testing.assert_allclose(ours.log_px, host.log_px, atol=0.01)
    np.testing.assert_allclose(ours.mean, host.mean, atol=1e-3)


@pytest.mark.gpu
def test_a_batch_that_does_not_fit_fails_alone_and_the_engine_goes_on(engines):
    engine = engines("mnist-iterative", "cuda")
    free, _ = torch.cuda.mem_get_info()
    rows = LARGEST_BUCKET
    samples = int(free / (rows * 784 * 4))  # one layer of it fills the device
    seeds, word = np.zeros(rows, np.uint64), np.zeros((rows, 1), np.uint64)
    zero = np.zeros(rows, np.int64)
    too_much = {"noise0": Keys(seeds, word, zero, zero, samples, 64, (samples, 64))}
    with pytest.raises(MemoryError, match="has no memory for score"):
        engine.run_rows("score", np.arange(rows), too_much)
    few = {"noise0": Keys(seeds[:4], word[:4], zero[:4], zero[:4], 2, 64, (2, 64))}
    assert np.isfinite(engine.run_rows("score", np.arange(4), few)["kl"]).all()


@pytest.mark.gpu
def test_a_budget_binds_the_allocator_and_refuses_in_words():
    from models.artifact import ArtifactError
    from service.engine.memory import DeviceMemory

    with pytest.raises(ArtifactError, match="raise ELBOW_DEVICE_MEMORY_MB"):
        TorchScriptDeviceEngine(Artifact.open(SHIPPED["mnist-iterative"]), "cuda", DeviceMemory(2**20))
    torch.cuda.set_per_process_memory_fraction(1.0)
