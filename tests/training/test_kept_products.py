"""Products kept from one pass and given to another: the same answer and gradients, and no product made again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from models.layers import MLP
from training.kept_products import Give, Keep

ROWS, INPUTS, WIDTH = 6, 5, 7


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(MLP(INPUTS, (WIDTH, WIDTH), highway=True), nn.Linear(WIDTH, 3, bias=False)).double()


def gradients(network: nn.Module, answer: Tensor, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(answer.square().sum(), [x, *network.parameters()]))


def kept_in_two_halves(network: nn.Module, x: Tensor) -> list[Tensor]:
    found = []
    for half in x.detach().chunk(2):
        with torch.no_grad(), Keep(network) as kept:
            network(half)
        found.append(kept.products)
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def test_given_products_have_the_gradients_of_computed_ones(network: nn.Module) -> None:
    x = torch.randn(ROWS, INPUTS, dtype=torch.float64, requires_grad=True)
    expected = network(x)
    products = kept_in_two_halves(network, x)
    assert len(products) == len([layer for layer in network.modules() if isinstance(layer, nn.Linear)])
    with Give(products):
        answer = network(x)
    assert_close(answer, expected)
    assert_close(gradients(network, answer, x), gradients(network, expected, x))


def test_the_value_is_what_was_given(network: nn.Module) -> None:
    x = torch.randn(ROWS, INPUTS, dtype=torch.float64)
    products = [torch.full_like(product, 0.5) for product in kept_in_two_halves(network, x)]
    with Give(products):
        assert_close(network(x), torch.full((ROWS, 3), 0.5, dtype=torch.float64))


def test_under_autocast_gradients_are_those_of_autocast(network: nn.Module) -> None:
    network.float()
    x = torch.randn(ROWS, INPUTS, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expected = network(x)
        products = kept_in_two_halves(network, x)
        with Give(products):
            answer = network(x)
    found = gradients(network, answer, x)
    assert {gradient.dtype for gradient in found} == {torch.float32}
    assert_close(found, gradients(network, expected, x), rtol=0.02, atol=0.02)


def test_layers_of_others_are_not_kept(network: nn.Module) -> None:
    other, x = nn.Linear(INPUTS, INPUTS).double(), torch.randn(ROWS, INPUTS, dtype=torch.float64)
    with torch.no_grad(), Keep(network) as kept:
        network(torch.func.grad(lambda x: other(x).square().sum())(x))
    assert len(kept.products) == len(kept_in_two_halves(network, x))


@pytest.mark.parametrize("count", [3, 5])
def test_another_number_of_layers_is_refused(network: nn.Module, count: int) -> None:
    x = torch.randn(ROWS, INPUTS, dtype=torch.float64)
    products = kept_in_two_halves(network, x)
    assert len(products) == 4
    with pytest.raises(ValueError, match="were kept"), Give([*products, products[-1]][:count]):
        network(x)
