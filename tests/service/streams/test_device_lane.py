"""Streams whose state lives on a device give what they give on the host, and go on from each other's tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from models.artifact import Artifact
from service.engine.onnx import OnnxEngine
from service.streams.stream import Portion, StreamSpec
from service.streams.tokens import Snapshot, Tokens
from tests.service.streams.test_lane import Bench, Frames, frames

pytest.importorskip("torch")

from service.engine.torchscript_device import TorchScriptDeviceEngine

FULL = frozenset({"elbo", "prediction", "posterior", "reconstruction"})


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, artifact: Artifact) -> Iterator[Any]:
    engine = TorchScriptDeviceEngine(artifact, request.param)
    yield engine
    engine.close()


def filtered(engine: Any, specs: list[StreamSpec], x: list[Frames]) -> list[Portion]:
    bench = Bench(engine)
    portions = [bench.feed(bench.open(spec), one, wants_state=True) for spec, one in zip(specs, x, strict=True)]
    bench.run()
    assert all(portion.error is None for portion in portions)
    return portions


@pytest.mark.parametrize("steps", [0, 2, 3], ids=["no steps", "fused", "from parts"])
def test_streams_side_by_side_get_on_a_device_what_they_get_on_the_host(artifact: Artifact, device: Any, steps: int) -> None:
    specs = [StreamSpec(steps=steps, seed=seed) for seed in range(5)]
    x = [frames(seed, 8 + seed) for seed in range(5)]
    host = filtered(OnnxEngine(artifact), specs, x)
    for ours, theirs in zip(filtered(device, specs, x), host, strict=True):
        np.testing.assert_allclose(ours.elbo, theirs.elbo, atol=1e-3, rtol=1e-5)


def test_what_is_shown_of_a_frame_is_its_own(artifact: Artifact, device: Any) -> None:
    specs = [StreamSpec(steps=2, seed=seed, parts=FULL) for seed in range(3)]
    x = [frames(seed, 6) for seed in range(3)]
    for ours, theirs in zip(filtered(device, specs, x), filtered(OnnxEngine(artifact), specs, x), strict=True):
        for shown, expected in zip(ours.shown, theirs.shown, strict=True):
            assert set(shown) == set(expected)
            for name, value in expected.items():
                np.testing.assert_allclose(shown[name], value, atol=1e-3, rtol=1e-4)


def test_a_stream_goes_on_from_a_token_made_by_another_engine(artifact: Artifact, device: Any) -> None:
    """On the CPU first, then on the device, then on the CPU again: as if it had never moved."""
    tokens = Tokens(b"secret of the tests", 60.0, 65_536)
    x, spec = frames(3, 15), StreamSpec(steps=2, seed=9)
    whole = filtered(OnnxEngine(artifact), [spec], [x])[0]
    elbo: list[float] = []
    state = None
    for place, engine in enumerate([OnnxEngine(artifact), device, OnnxEngine(artifact)]):
        went_on = StreamSpec(steps=2, seed=9, state=state, frame=5 * place)
        portion = filtered(engine, [went_on], [x[5 * place : 5 * place + 5]])[0]
        elbo += portion.elbo
        assert portion.state is not None
        token = tokens.issue(Snapshot(settings={}, frame=5 * place + 5, samples=0, summary={}, state=portion.state), artifact.sha256)
        state = tokens.read(token, artifact.sha256).state
    np.testing.assert_allclose(elbo, whole.elbo, atol=1e-3, rtol=1e-5)
