"""Layers with hand-written derivatives against torch's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from models.layers import MLP, elu, layer_norm, softplus

Draw = Callable[..., Tensor]
PAIRS = pytest.mark.parametrize(("ours", "theirs"), [(elu, nn.functional.elu), (softplus, nn.functional.softplus)], ids=["elu", "softplus"])


@PAIRS
def test_value_and_gradient_are_those_of_torch(
    ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    a = torch.cat([torch.linspace(-30, 30, 601, dtype=dtype), torch.tensor([-1e3, 1e3], dtype=dtype)]).requires_grad_()
    weights = torch.linspace(1, 2, len(a), dtype=dtype)
    assert_close(ours(a), theirs(a))
    (mine,), (expected,) = (torch.autograd.grad((f(a) * weights).sum(), a) for f in (ours, theirs))
    # torch's softplus turns linear at 20, where σ(20) is 1 − 2e-9; ours takes elu′ from elu, exact to one unit in the last place of 1
    assert_close(mine, expected, atol=1e-8 if dtype == torch.float64 else 2e-7, rtol=1e-6)


@PAIRS
def test_gradient_is_that_of_finite_differences(ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], normal: Draw) -> None:
    assert torch.autograd.gradcheck(ours, normal(20).double().requires_grad_())


@PAIRS
def test_functional_gradient_is_the_same(ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], normal: Draw) -> None:
    a = normal(20)
    assert_close(torch.func.grad(lambda v: ours(v).sum())(a), torch.func.grad(lambda v: theirs(v).sum())(a))


def test_layer_norm_is_that_of_torch_and_per_row(normal: Draw) -> None:
    a = 5 * normal(4, 9)
    assert_close(layer_norm(a), nn.functional.layer_norm(a, (9,)))
    assert_close(layer_norm(a[2:3]), layer_norm(a)[2:3])


def test_layer_norm_is_continuous_at_zero(dtype: torch.dtype) -> None:
    zero = torch.zeros(1, 5, dtype=dtype)
    direction = torch.tensor([[1.0, -2, 3, -4, 5]], dtype=dtype)
    assert torch.equal(layer_norm(zero), zero)
    assert float(layer_norm(1e-8 * direction).abs().max()) < 1e-4


def test_an_mlp_is_its_layers_in_turn(normal: Draw, dtype: torch.dtype) -> None:
    mlp, a = MLP(4, (6, 5)).to(dtype), normal(3, 4)
    h = a
    for layer in mlp.layers:
        h = nn.functional.elu(nn.functional.linear(h, layer.weight, layer.bias))
    assert_close(mlp(a), h)
    assert mlp.output_size == 5


def test_an_mlp_without_layers_passes_its_input_on(normal: Draw) -> None:
    a = normal(3, 4)
    assert torch.equal(MLP(4, ())(a), a)


def test_a_highway_gates_layers_of_equal_width_only(normal: Draw, dtype: torch.dtype) -> None:
    mlp, a = MLP(4, (6, 6), highway=True).to(dtype), normal(3, 4)
    assert set(mlp.gates) == {"1"}
    h = nn.functional.elu(mlp.layers[0](a))
    carry = torch.sigmoid(mlp.gates["1"](h))
    assert_close(mlp(a), carry * nn.functional.elu(mlp.layers[1](h)) + (1 - carry) * h)
