"""A simplified graph is the traced function with less to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from models.layers import elu, softplus
from training.onnx_graph import suit_onnx_runtime
from training.simplify import simplify

aten = torch.ops.aten
ROWS, SAMPLES, SIZE = 3, 4, 7


def traced(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The graph as traced and as simplified; the first two sizes of the last input vary."""
    graph = make_fx(function, tracing_mode="symbolic")(*inputs)
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    return graph, simplify(graph, {str(size) for size in last.meta["val"].shape[:2]})


def targets(graph: fx.GraphModule) -> list[object]:
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def bernoulli_gradient(mask: Tensor, logits: Tensor) -> Tensor:
    def objective(a: Tensor) -> Tensor:
        return ((a - softplus(a)) * mask.unsqueeze(1)).sum(-1).mean(-1).sum()

    return torch.func.grad(objective)(logits)


@pytest.mark.parametrize(("rows", "samples"), [(ROWS, SAMPLES), (5, 2), (1, 1)])
def test_the_gradient_stays_the_same_at_every_number_of_rows_and_samples(rows: int, samples: int) -> None:
    _, simple = traced(bernoulli_gradient, draw(ROWS, SIZE), draw(ROWS, SAMPLES, SIZE))
    mask, logits = draw(rows, SIZE), draw(rows, samples, SIZE)
    torch.testing.assert_close(simple(mask, logits), bernoulli_gradient(mask, logits))


def test_the_objectives_value_and_its_spread_ones_are_gone() -> None:
    graph, simple = traced(bernoulli_gradient, draw(ROWS, SIZE), draw(ROWS, SAMPLES, SIZE))
    assert {aten.ones_like.default, aten.expand.default, aten.log1p.default} <= set(targets(graph))
    assert not {aten.ones_like.default, aten.expand.default, aten.log1p.default} & set(targets(simple))


def test_an_expanded_tensor_is_whole_where_its_shape_matters() -> None:
    def function(row: Tensor, x: Tensor) -> Tensor:
        return (row.unsqueeze(1).expand(x.shape) * 2).sum(1) + torch.ones_like(x).sum(1)

    _, simple = traced(function, draw(ROWS, SIZE), draw(ROWS, SAMPLES, SIZE))
    row, x = draw(5, SIZE), draw(5, 2, SIZE)
    torch.testing.assert_close(simple(row, x), function(row, x))


def test_equal_calls_are_made_once_and_trivial_factors_vanish() -> None:
    def function(x: Tensor) -> Tensor:
        return ((x.exp() * 0.5 * 2.0) + x.exp()) ** 1 + (torch.expm1(x) + 1)

    _, simple = traced(function, draw(ROWS, SAMPLES))
    assert targets(simple).count(aten.exp.default) == 1
    assert aten.mul.Tensor not in targets(simple)
    assert aten.expm1.default not in targets(simple)
    x = draw(6, 2)
    torch.testing.assert_close(simple(x), 3 * x.exp())


def test_one_is_minus_a_negative_and_a_number_less_a_tensor_keep_their_sign() -> None:
    def function(x: Tensor) -> Tensor:
        return (-x + 1) * (torch.ones_like(x) - x) / (torch.ones_like(x) / x)

    _, simple = traced(function, draw(ROWS, SAMPLES))
    x = draw(6, 2)
    torch.testing.assert_close(simple(x), (1 - x) * (1 - x) * x)


def test_elu_for_onnx_runtime_is_the_same_function_with_the_same_derivative() -> None:
    def function(x: Tensor) -> Tensor:
        return torch.func.grad(lambda a: (elu(a) * a).sum())(x)

    _, simple = traced(function, draw(ROWS, SAMPLES))
    suited = suit_onnx_runtime(simple)
    assert not {aten.elu.default, aten.clamp.default} & set(targets(suited))
    assert targets(suited).count(aten.exp.default) == 1
    x = torch.cat([draw(6, 2), torch.tensor([[0.0, -50.0], [50.0, -1e-9]], dtype=torch.float64)])
    torch.testing.assert_close(suited(x), function(x))


def test_a_split_for_onnx_runtime_gives_the_same_parts() -> None:
    def function(x: Tensor) -> Tensor:
        a, b = x.split([3, 4], -1)
        return a.sum(-1) - b.sum(-1)

    _, simple = traced(function, draw(ROWS, SAMPLES, SIZE))
    suited = suit_onnx_runtime(simple)
    assert aten.split_with_sizes.default not in targets(suited)
    x = draw(5, 2, SIZE)
    torch.testing.assert_close(suited(x), function(x))
