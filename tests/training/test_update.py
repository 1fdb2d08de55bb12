"""The update traced into a flat graph, and compiled, against the eager one."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from models.architecture import Architecture, DirectArchitecture, InferenceArchitecture, IterativeArchitecture, VAEArchitecture
from models.catalogue import LatentModel, build
from models.objective import Noise
from training.step import fresh_noise
from training.update import Gradients

B, S, X, D, K = 6, 2, 10, 3, 3
ARCHITECTURES = {"iterative": IterativeArchitecture(hidden=(16, 16)), "direct": DirectArchitecture((16,))}
BOTH = pytest.mark.parametrize("inference", ARCHITECTURES.values(), ids=ARCHITECTURES)


def setting(inference: InferenceArchitecture) -> tuple[LatentModel, torch.Tensor, torch.Tensor, list[Noise]]:
    model = build(Architecture(VAEArchitecture(X, D, (16,)), inference), seed=0)
    generator = torch.Generator().manual_seed(0)
    x, mask = ((torch.rand(B, X, generator=generator) < 0.6).float() for _ in range(2))
    draws = K + 1 if model.inference.refines else 1
    noise = [fresh_noise((D,), B, S, True, torch.device("cpu"), generator) for _ in range(draws)]
    return model, x, mask, noise


@BOTH
def test_the_traced_update_equals_the_eager_one_on_other_numbers(inference: InferenceArchitecture) -> None:
    model, x, mask, noise = setting(inference)
    gradients = Gradients(model, K, nullcontext, compiled=False)
    values = [parameter.detach() for parameter in model.parameters()]
    flat = [part for draw in noise for part in draw]
    graph = make_fx(lambda *args: gradients._pure(*args))(values, x, mask, torch.tensor(1.0), flat)  # noqa: PLW0108
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    x = 1 - x
    seen = gradients(x, mask, noise, 0.3)
    with torch.no_grad():
        outputs = graph([parameter.detach() for parameter in model.parameters()], x, mask, torch.tensor(0.3), flat)
    count = len(values)
    assert_close(outputs[:count], [parameter.grad for parameter in model.parameters()], atol=1e-5, rtol=1e-5)
    assert_close(outputs[count + 4 * (len(seen) - 1)], seen[-1].elbo)
    assert not any("autograd" in str(node.target) for node in graph.graph.nodes)


@BOTH
def test_the_pure_update_leaves_nothing_on_the_model(inference: InferenceArchitecture) -> None:
    model, x, mask, noise = setting(inference)
    gradients = Gradients(model, K, nullcontext, compiled=False)
    values = [parameter.detach() for parameter in model.parameters()]
    gradients._pure(values, x, mask, torch.tensor(1.0), [part for draw in noise for part in draw])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_reduced_precision_stays_close_and_gives_full_precision_gradients() -> None:
    model, x, mask, noise = setting(IterativeArchitecture(hidden=(16, 16)))
    full = Gradients(model, K, nullcontext, compiled=False)(x, mask, noise, 1.0)
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    reduced = Gradients(model, K, lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False), compiled=False)
    seen = reduced(x, mask, noise, 1.0)
    assert {parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None} == {torch.float32}
    assert_close(seen[-1].elbo, full[-1].elbo, atol=0.1, rtol=0.02)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert gradient is not None
        assert float((parameter.grad - gradient).norm()) <= 0.1 * float(gradient.norm()) + 1e-2


@pytest.mark.slow  # torch's compiler takes tens of seconds
@BOTH
def test_the_compiled_update_equals_the_eager_one(inference: InferenceArchitecture) -> None:
    model, x, mask, noise = setting(inference)
    compiled = Gradients(model, K, nullcontext, compiled=True)
    for weight in (1.0, 0.3):
        seen = compiled(x, mask, noise, weight)
        outputs = [parameter.grad for parameter in model.parameters()]
        model.zero_grad(set_to_none=True)
        expected = Gradients(model, K, nullcontext, compiled=False)(x, mask, noise, weight)
        assert_close(outputs, [parameter.grad for parameter in model.parameters()], atol=1e-5, rtol=1e-4)
        assert_close(seen[-1].elbo, expected[-1].elbo)
