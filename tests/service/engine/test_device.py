"""Rows that live on a device: buckets, slots, guards, memory. On "cpu" the same code without graphs; on "cuda" with them."""

import numpy as np
import pytest

from models.artifact import ArtifactError
from service.building import build_engine
from service.engine.memory import LEAST_SLOTS, DeviceMemory
from service.noise import Purpose, words
from service.scheduler.job import Ask, JobResult
from service.scheduler.noise_ahead import keys
from service.scheduler.scheduler import Scheduler
from service.settings import Settings
from tests.service.scheduler.support import Clock, job, run

torch = pytest.importorskip("torch")

from service.engine.torchscript_device import LARGEST_BUCKET, TorchScriptDeviceEngine, bucket_of  # noqa: E402

LIMIT = 1e-5
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
REPEATED = 3
"""On a GPU the second call of a shape captures its graph, so the third is a plain replay."""


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture
def iterative(artifact):
    if not artifact.card.iterative:
        pytest.skip("a direct model does not refine")
    return artifact


def ready(artifact, device, capacity=40, **kwargs):
    engine = TorchScriptDeviceEngine(artifact, device, **kwargs)
    assert engine.allocate(capacity) == capacity
    return engine


def images(engine, rows, seed=0):
    x = (np.random.default_rng(seed).random((rows, engine.card.x.size)) < 0.4).astype(np.float32)
    return {"x": x, "mask": np.ones_like(x)}


def noise(engine, rows, step=0, seed=0):
    shape = (engine.card.levels[0].size,)
    seeds = np.arange(seed, seed + rows, dtype=np.uint64)
    return {"noise0": keys(seeds, words(step, level=0, purpose=Purpose.REFINE), (0, engine.card.samples), shape, True)}


def start(engine, slots, given, seed=0):
    """Rows after `init`, moved to a place of their own: an untrained model would leave all of them at the prior."""
    engine.load_rows(slots, given)
    engine.run_rows("init", slots, {})
    size = engine.card.levels[0].size
    moved = [np.random.default_rng(seed + row).standard_normal((2, size)) for row in range(len(slots))]
    engine.load_rows(slots, {"q0.mu": np.stack([m[0] for m in moved]), "q0.log_sigma": np.stack([m[1] for m in moved]) / 4})


def refine(engine, slots, given, steps=3, seed=0):
    """Carry and norms of rows after some steps; the noise is that of the row's own seed."""
    start(engine, slots, given, seed)
    norms = [engine.run_rows("step", slots, noise(engine, len(slots), k, seed))["grad_norm"].copy() for k in range(steps)]
    return engine.read_rows(slots, [tensor.name for tensor in engine.card.carry]), norms


def same(a, b, limit=LIMIT):
    return all(float(np.max(np.abs(a[name] - b[name]) / np.maximum(1, np.abs(b[name])))) <= limit for name in b)


def test_a_batch_is_padded_to_the_next_power_of_two():
    assert [bucket_of(rows) for rows in (1, 2, 3, 4, 5, 8, 9, 8191, 8192)] == [1, 2, 4, 4, 8, 8, 16, 8192, 8192]


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 16, 31, 33])
def test_a_row_refined_in_a_bucket_equals_the_row_refined_alone(iterative, device, rows):
    engine = ready(iterative, device)
    given = images(engine, rows)
    slots = np.random.default_rng(rows).permutation(40)[:rows]
    together, norms = refine(engine, slots, given)
    for row in {0, rows // 2, rows - 1}:
        alone, norm = refine(engine, np.array([5]), {name: value[row : row + 1] for name, value in given.items()}, seed=row)
        assert same({name: value[row] for name, value in together.items()}, {name: value[0] for name, value in alone.items()})
        assert np.allclose([n[row] for n in norms], np.ravel(norm), rtol=LIMIT, atol=LIMIT)
    engine.close()


def test_keys_and_the_arrays_they_stand_for_give_the_same_step(iterative, device):
    engine = ready(iterative, device)
    given, slots = images(engine, 6), np.arange(6)
    by_keys, _ = refine(engine, slots, given)
    start(engine, slots, given)
    for k in range(3):
        engine.run_rows("step", slots, {"noise0": noise(engine, 6, k)["noise0"].draw()})
    assert same(by_keys, engine.read_rows(slots, list(by_keys)))
    engine.close()


def test_a_slot_keeps_nothing_of_the_row_before_nor_of_its_neighbours(iterative, device):
    """Every slot, and the one that padding uses, is poisoned; a new row must read as if the device had just been switched on."""
    engine = ready(iterative, device)
    clean, norms = refine(engine, np.array([3, 8, 1]), images(engine, 3))
    for repeat in range(REPEATED):
        for rows in engine._rows.values():
            rows.fill_(np.nan)
        again, again_norms = refine(engine, np.array([7, repeat, 3]), images(engine, 3))
        assert all(np.array_equal(again[name], clean[name]) for name in clean)
        assert np.array_equal(again_norms, norms)
    others = engine.read_rows(np.array([20, 39]), ["x", "q0.mu"])
    assert all(np.isnan(value).all() for value in others.values()), "a batch wrote into slots that are not its own"
    engine.close()


def test_a_guarded_row_keeps_what_it_had_and_the_others_go_on(iterative, device):
    engine = ready(iterative, device)
    given, slots = images(engine, 3), np.array([4, 2, 9])
    before, _ = refine(engine, slots, given, steps=1)
    spoiled = noise(engine, 3, 1)["noise0"].draw()
    spoiled[1] = np.nan
    for _ in range(REPEATED):
        norm = engine.run_rows("step", slots, {"noise0": spoiled}, guard="grad_norm")["grad_norm"]
        assert np.isfinite(norm).tolist() == [True, False, True]
    after = engine.read_rows(slots, list(before))
    for name, value in after.items():
        assert np.array_equal(value[1], before[name][1])
        assert not np.array_equal(value[0], before[name][0])
        assert np.isfinite(value).all()
    engine.close()


def test_outputs_looked_at_late_are_those_of_their_own_batch(iterative, device):
    """One tick late: another program has run on the same rows in between."""
    engine = ready(iterative, device)
    slots = np.arange(5)
    refine(engine, slots, images(engine, 5), steps=0)
    for k in range(REPEATED):
        late = engine.run_rows("step", slots, noise(engine, 5, k))
        size = engine.card.levels[0].size
        engine.run_rows("score", slots, {"noise0": np.zeros((5, 1, size), np.float32)})
        assert list(late) == ["grad_norm"]
        assert late["grad_norm"].shape == (5,)
        assert np.isfinite(late["grad_norm"]).all()
    engine.close()


def test_more_rows_than_the_largest_bucket_are_cut(artifact, device):
    engine = TorchScriptDeviceEngine(artifact, device)
    z = np.random.default_rng(0).standard_normal((LARGEST_BUCKET + 3, 1, engine.card.levels[0].size)).astype(np.float32)
    decoded = engine.run("decode", {"z0": z})
    assert decoded["mean"].shape[0] == LARGEST_BUCKET + 3
    assert same({"mean": decoded["mean"][-3:]}, {"mean": engine.run("decode", {"z0": z[-3:]})["mean"]})
    engine.close()


def test_two_models_share_a_device_and_do_not_meet(artifact, device):
    memory = DeviceMemory()
    scheduler = Scheduler(clock=Clock(), slots=24)
    engines = [TorchScriptDeviceEngine(artifact, device, memory) for _ in range(2)]
    for name, engine in zip("ab", engines, strict=True):
        scheduler.add_model(name, engine)
    x = images(engines[0], 6)["x"]
    ask = Ask(samples=2, trace=artifact.card.iterative)
    alone = run(scheduler, job(6, 4, x=x, model="a", ask=ask))[0]
    a, b = run(scheduler, job(6, 4, x=x, model="a", ask=ask), job(6, 4, x=x[::-1].copy(), model="b", ask=ask))
    assert isinstance(alone, JobResult)
    assert isinstance(b, JobResult)
    assert np.allclose(a.elbo, alone.elbo, rtol=1e-5)
    for engine in engines:
        engine.close()
    assert memory.left_bytes == memory.total_bytes


def test_memory_says_how_many_slots_each_model_gets(artifact, device):
    probe = TorchScriptDeviceEngine(artifact, device)
    weights, slot = artifact.file("weights.safetensors").stat().st_size, probe.slot_bytes
    probe.close()
    if device != "cpu":
        pytest.skip("a budget of some kilobytes would leave the CUDA allocator nothing to load a model with")
    memory = DeviceMemory(2 * weights + 400 * slot)
    first, second = (TorchScriptDeviceEngine(artifact, device, memory) for _ in range(2))
    assert (first.allocate(1000), second.allocate(1000)) == (200, 100)
    first.close()
    third = TorchScriptDeviceEngine(artifact, device, DeviceMemory(weights + 400 * slot))
    assert third.allocate(50) == 50


def test_a_spent_budget_is_refused_in_words(artifact, device):
    with pytest.raises(ArtifactError, match=r"its weights needs .* MB are left: raise ELBOW_DEVICE_MEMORY_MB"):
        TorchScriptDeviceEngine(artifact, device, DeviceMemory(100))
    if device == "cpu":
        memory = DeviceMemory(artifact.file("weights.safetensors").stat().st_size + 100)
        with pytest.raises(ArtifactError, match=f"room for {LEAST_SLOTS} rows needs"):
            TorchScriptDeviceEngine(artifact, device, memory).allocate(1000)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused_in_words(artifact):
    with pytest.raises(ArtifactError, match="finds no CUDA device here: set it to cpu"):
        TorchScriptDeviceEngine(artifact, "cuda")


def test_a_device_runs_torchscript_only(artifact):
    with pytest.raises(ArtifactError, match="ELBOW_DEVICE=cuda:1 needs TorchScript: set ELBOW_ENGINE to auto or torchscript"):
        build_engine(artifact, "onnx", 1, "cuda:1")


@pytest.mark.parametrize("name", ["tpu", "cuda:", "cuda:x", "CPU"])
def test_a_device_that_is_none_is_refused_by_the_settings(name):
    with pytest.raises(ValueError, match="device"):
        Settings(device=name)


def test_arrays_that_a_program_makes_are_made_on_the_device(artifact):
    """A traced `full` names no device, so it would fill on the CPU, out of reach of a graph."""
    from service.engine.torchscript import FORMAT, place_factories

    made = 0
    for spec in artifact.card.programs.values():
        module = torch.jit.load(str(artifact.file(spec.files[FORMAT])))
        place_factories(module, torch.device("cuda:1"))
        for node in module.graph.findAllNodes("aten::full"):
            size, _, _, _, place, _ = node.inputs()
            scalar = size.node().kind() == "prim::ListConstruct" and not list(size.node().inputs())
            assert scalar or place.toIValue() == torch.device("cuda:1")
            made += not scalar
    assert made or not artifact.card.iterative
