"""The models in checkpoints/: what the service says of them is true of them, on real digits.

1,000 rows: each of the 320 digits of tests/data/mnist_sample.npz binarised several times.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from models.artifact import WEIGHTS, Artifact, list_versions
from service.engine.onnx import OnnxEngine
from service.scheduler.job import Ask, Budget, Job, StopReason
from service.scheduler.scheduler import Scheduler
from service.stream_client import read_sound
from tests.int8 import needs_exact_int8

ROOT = Path(__file__).parents[1]
SHIPPED = {name: path for name, _, path in list_versions(ROOT / "checkpoints")}
ROWS, STEPS, SAMPLES, INDEPENDENT = 1000, 64, 8, 1000


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    with np.load(ROOT / "tests/data/mnist_sample.npz") as sample:
        pixels = np.concatenate([sample["train"], sample["valid"]]).reshape(-1, 784)
    pixels = np.resize(pixels, (ROWS, 784))
    return (np.random.default_rng(0).random(pixels.shape) < pixels / 255).astype(np.float32)


@pytest.fixture(scope="module")
def iterative() -> OnnxEngine:
    return OnnxEngine(Artifact.open(SHIPPED["mnist-iterative"]), threads=2)


def serve(
    engine: OnnxEngine, x: np.ndarray, steps: int, samples: int, *, mask: np.ndarray | None = None, events: bool = False, trace: bool = True
):
    scheduler = Scheduler(slots=len(x), tick_s=0.1)  # nobody else waits: large batches
    scheduler.add_model("shipped", engine)
    job = Job(
        model="shipped",
        seeds=np.arange(len(x), dtype=np.uint64),
        budget=Budget(steps),
        ask=Ask(samples=samples, trace=trace),
        x=x,
        mask=np.ones_like(x) if mask is None else mask,
        on_step=(lambda event: None) if events else None,
    )
    ticket = scheduler.enqueue(job)
    scheduler.drain()
    if isinstance(ticket.outcome, BaseException):
        raise ticket.outcome
    return ticket.outcome


def independent_elbo(engine: OnnxEngine, x: np.ndarray, carry: dict[str, np.ndarray]) -> np.ndarray:
    """(R, INDEPENDENT) ELBO samples by noise that the service never draws."""
    generator = np.random.default_rng(99)
    latent = engine.card.levels[0].size
    parts = []
    for rows in np.array_split(np.arange(len(x)), 40):
        noise = generator.standard_normal((len(rows), INDEPENDENT, latent), dtype=np.float32)
        arrays = {"x": x[rows], "mask": np.ones_like(x[rows]), "noise0": noise, **{name: value[rows] for name, value in carry.items()}}
        wanted = {tensor.name for tensor in engine.card.programs["score"].inputs}
        scores = engine.run("score", {name: value for name, value in arrays.items() if name in wanted})
        parts.append(scores["log_likelihood"] - scores["kl"].sum(1, keepdims=True))
    return np.concatenate(parts)


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_a_shipped_artifact_is_whole_small_and_says_where_it_comes_from(name):
    artifact = Artifact.open(SHIPPED[name])
    sizes = {file: spec.bytes for file, spec in artifact.card.files.items()}
    assert sum(sizes.values()) <= min(8e6, 1.3 * sizes[WEIGHTS])
    assert {"commit", "seed", "run", "data", "libraries"} <= artifact.card.provenance.keys()


def test_the_elbo_rises_with_the_steps_and_stays(iterative, digits):
    result = serve(iterative, digits[:200], STEPS, 16)
    trace = np.array(result.trace).mean(0)
    assert trace[0] < trace[1] < trace[2] < trace[5]
    assert trace[STEPS] > trace[5] - 0.2


def hidden(kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Masks of so many digits."""
    if kind.endswith("of pixels"):
        return (np.random.default_rng(3).random(shape) < float(kind.split(maxsplit=1)[0])).astype(np.float32)
    mask = np.ones((shape[0], 28, 28), np.float32)
    mask[:, 14:] = 0
    return mask.reshape(shape)


@pytest.mark.parametrize("kind", ["0.5 of pixels", "0.1 of pixels", "the upper half"])
def test_of_a_digit_with_a_part_hidden_too_every_step_says_more_and_none_runs_away(iterative, digits, kind):
    """A refiner that has never seen a mask has an ELBO of minus millions here after a few steps."""
    x = digits[:100]
    trace = np.mean(serve(iterative, x, STEPS, SAMPLES, mask=hidden(kind, x.shape)).trace, axis=0)
    assert trace[1] < trace[2] < trace[5]
    assert trace[5:].min() > trace[5] - 1
    whole = np.mean(serve(iterative, x, 5, SAMPLES).trace, axis=0)
    assert trace[5] > whole[5] + 20, "there is less to say"


@pytest.mark.parametrize("events", [False, True], ids=["plain replies", "the best of events"])
def test_the_elbo_a_reply_states_is_unbiased(iterative, digits, events):
    result = serve(iterative, digits, STEPS, SAMPLES, events=events, trace=False)
    difference = result.elbo - independent_elbo(iterative, digits, result.carry).mean(1)
    error = difference.std(ddof=1) / np.sqrt(ROWS)
    assert abs(difference.mean()) < min(0.1, 3 * error)


def test_the_direct_model_answers_any_number_of_steps_with_none_and_is_worse(iterative, digits):
    direct = OnnxEngine(Artifact.open(SHIPPED["mnist-direct"]), threads=2)
    result = serve(direct, digits[:500], 5, 16)
    assert set(result.stop_reason) == {StopReason.CONVERGED}
    assert result.steps_used.max() == 0
    assert serve(iterative, digits[:500], 5, 16).elbo.mean() > result.elbo.mean() + 0.9


@needs_exact_int8
@pytest.mark.parametrize("name", ["mnist-iterative", "mnist-direct"])
def test_int8_costs_on_these_digits_what_the_card_says(name, digits):
    artifact = Artifact.open(SHIPPED[name])
    spec = artifact.card.precisions["int8"]
    float32, int8 = (
        serve(OnnxEngine(artifact, threads=2, precision=precision), digits[:500], artifact.card.trained_steps, 16).elbo
        for precision in ("float32", "int8")
    )
    lost = float32 - int8
    assert 0 < abs(lost.mean() - spec.cost_nats) <= 3 * lost.std(ddof=1) / np.sqrt(len(lost))


FILTERS = ("speech-filter", "jsb-filter")


@pytest.mark.parametrize("name", FILTERS)
def test_a_shipped_filter_is_small_and_runs_on_every_engine(name: str) -> None:
    """The chorale model's LSTM once loaded in one engine only: TorchScript merged products that it must not."""
    path = SHIPPED[name]
    assert sum(file.stat().st_size for file in path.iterdir()) <= 8 << 20
    artifact = Artifact.open(path)
    engines = [OnnxEngine(artifact)]
    if importlib.util.find_spec("torch"):
        from service.engine.torchscript import TorchScriptEngine

        engines.append(TorchScriptEngine(artifact))  # type: ignore[arg-type]
    for engine in engines:
        assert max(engine.parity.values()) < 1e-4


def test_the_example_of_speech_is_what_the_readme_says() -> None:
    """26 frames of 25 ms; silence at the end surprises least."""
    from service.streams.lane import StreamLane
    from service.streams.stream import Portion, Stream, StreamSpec

    rate, samples = read_sound(ROOT / "examples" / "speech.wav")
    frames = (samples[: len(samples) // 200 * 200] / 32768).astype(np.float32).reshape(-1, 200)
    engine = OnnxEngine(Artifact.open(SHIPPED["speech-filter"]))
    lane, done = StreamLane("speech", engine, lambda: 0.0, 2, lambda: None), []
    stream = Stream(StreamSpec(steps=1, seed=0), done.append, None)
    lane.open(stream)
    lane.feed(Portion(stream, frames, None, 0.0))
    while lane.has_work():
        lane.tick(0.002)
        for portion in lane.answered():
            portion.settle()
    assert rate == engine.card.x.sample_rate
    assert len(done[0].elbo) == 25
    assert np.isfinite(done[0].elbo).all()
    assert max(done[0].elbo[-3:]) > np.median(done[0].elbo)
