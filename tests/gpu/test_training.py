"""Training updates on a device, against the same updates made eagerly on the host."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from models.architecture import Architecture, IterativeArchitecture, VAEArchitecture  # noqa: E402
from models.catalogue import build, build_filter  # noqa: E402
from tests.training.conftest import SAMPLE, four_by_four  # noqa: E402
from tests.training.test_sequence_loop import AVF  # noqa: E402
from training.config import DataConfig  # noqa: E402
from training.loop import Trainer  # noqa: E402
from training.run_loop import fabric_for  # noqa: E402
from training.sequence_step import Chunk  # noqa: E402
from training.sequence_update import SequenceGradients  # noqa: E402
from training.step import fresh_noise  # noqa: E402
from training.update import Gradients  # noqa: E402

# torch's compiler takes tens of seconds
DEVICES = [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
B, S, X, D, K = 6, 2, 10, 3, 3
UPDATES = 5
"""A GPU's first updates warm up and record the graph; the later ones replay it."""


def trained(device, compiled):
    """The ELBO of each update after its last step, and the weights in the end."""
    model = build(Architecture(VAEArchitecture(X, D, (16,)), IterativeArchitecture(hidden=(16, 16))), seed=0).to(device)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    gradients = Gradients(model, K, nullcontext, compiled)
    generator, elbos = torch.Generator().manual_seed(0), []
    for _ in range(UPDATES):
        x = (torch.rand(B, X, generator=generator) < 0.5).float()
        noise = [fresh_noise((D,), B, S, True, torch.device("cpu"), generator) for _ in range(K + 1)]
        noise = [tuple(part.to(device) for part in draw) for draw in noise]
        elbos.append(gradients(x.to(device), torch.ones_like(x).to(device), noise, 1.0)[-1].elbo.cpu())
        optimiser.step()
        optimiser.zero_grad()
    return elbos, [parameter.detach().cpu() for parameter in model.parameters()]


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_updates_on_a_device_are_the_eager_ones_of_the_host(device):
    (elbos, weights), (expected_elbos, expected_weights) = trained(device, True), trained("cpu", False)
    torch.testing.assert_close(elbos, expected_elbos, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_sequence_updates_on_a_device_are_the_eager_ones_of_the_host(device):
    """Each chunk goes on from the last one's state, which a graph's next replay must not have overwritten."""
    (elbos, state, weights), expected = learned_sequences(device, True), learned_sequences("cpu", False)
    for found, wanted in zip((elbos, state, weights), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


def learned_sequences(device, compiled):
    """The ELBO of each update, the state after the last, and the weights in the end."""
    model = build_filter(AVF, seed=0).to(device)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-4)
    gradients, generator = SequenceGradients(model, None, compiled), torch.Generator().manual_seed(0)
    elbos, state = [], None
    for _ in range(UPDATES):
        x = (torch.rand(B, 4, 88, generator=generator) < 0.1).float()
        noise = torch.randn(4, K + 1, B, 1, AVF.generative.latent, generator=generator)
        ones = torch.ones(B, 4)
        chunk = Chunk(x.to(device), torch.ones_like(x).to(device), ones.to(device), noise.to(device), state)
        seen = gradients(chunk, 1.0)
        state = seen.state
        elbos.append(seen.elbo.cpu())
        optimiser.step()
        optimiser.zero_grad()
    return elbos, {name: value.cpu() for name, value in state.items()}, [parameter.detach().cpu() for parameter in model.parameters()]


@pytest.mark.parametrize("device", DEVICES)
def test_a_compiled_run_learns_on_a_device(device, tmp_path):
    run = replace(four_by_four(), data=DataConfig(f"npz:{SAMPLE}"), compiled=True)
    Trainer(run, tmp_path, fabric_for(device)).fit()
    first, *_, last = [json.loads(line)["valid_elbo"][-1] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert last > first
