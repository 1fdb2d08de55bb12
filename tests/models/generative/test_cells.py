"""A cell's run over known inputs is its steps one by one, in values and in gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from models.generative.cells import CELLS, Cell

B, T, INPUTS, HIDDEN = 3, 5, 4, 7


def one_by_one(cell: Cell, projected: Tensor, state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    states = [state]
    for now in projected.unbind(1):
        states.append(cell.advance(now, states[-1]))
    return states


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["full", "autocast"])
def test_a_run_is_its_steps_one_by_one(name: str, precision: torch.dtype | None, generator: torch.Generator) -> None:
    dtype = torch.float64 if precision is None else torch.float32
    cell = CELLS[name](INPUTS, HIDDEN).to(dtype)
    x = torch.randn(B, T, INPUTS, generator=generator, dtype=torch.float64).to(dtype)
    learned = {part: torch.randn(1, HIDDEN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for part in cell.names}
    signals = torch.randn(T + 1, len(cell.names), B, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    found = []
    for run in (cell.run, lambda *given: one_by_one(cell, *given)):
        for leaf in (*cell.parameters(), *learned.values()):
            leaf.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is not None, cache_enabled=False):
            states = run(cell.project(x), {part: value.expand(B, -1) for part, value in learned.items()})
        values = torch.stack([torch.stack([state[part] for part in cell.names]) for state in states])
        (values * signals).sum().backward()
        found.append([values.detach(), *(leaf.grad.clone() for leaf in (*cell.parameters(), *learned.values()) if leaf.grad is not None)])
    assert len(found[0]) == len(found[1]) == 1 + len(list(cell.parameters())) + len(learned)
    assert all(a.dtype == dtype for a in found[0])
    close = {"rtol": 1e-9, "atol": 1e-11} if precision is None else {"rtol": 0.05, "atol": 0.1}
    assert_close(found[0], found[1], **close)


def test_a_run_whose_cell_state_is_not_read_has_the_same_gradient(generator: torch.Generator) -> None:
    cell = CELLS["lstm"](INPUTS, HIDDEN).double()
    x = torch.randn(B, T, INPUTS, generator=generator, dtype=torch.float64)
    start = {part: torch.zeros(B, HIDDEN, dtype=torch.float64) for part in cell.names}
    found = []
    for states in (cell.run(cell.project(x), start), one_by_one(cell, cell.project(x), start)):
        cell.zero_grad()
        states[-1]["h"].square().sum().backward()
        found.append([parameter.grad.clone() for parameter in cell.parameters() if parameter.grad is not None])
    assert_close(found[0], found[1])


@pytest.mark.parametrize("name", CELLS)
def test_what_stands_before_each_input_is_that_of_a_run(name: str, generator: torch.Generator) -> None:
    cell = CELLS[name](INPUTS, HIDDEN).double()
    x = torch.randn(B, T, INPUTS, generator=generator, dtype=torch.float64).requires_grad_()
    start = {part: torch.randn(B, HIDDEN, generator=generator, dtype=torch.float64).requires_grad_() for part in cell.names}
    signals = torch.randn(B, T, HIDDEN, generator=generator, dtype=torch.float64)
    states = cell.run(cell.project(x), start)
    found = []
    for h, last in (cell.before(x, start), (torch.stack([state["h"] for state in states[:-1]], 1), states[-1])):
        total = (h * signals).sum() + sum(last[part].square().sum() for part in cell.names)
        found.append([h, *last.values(), *torch.autograd.grad(total, [x, *start.values(), *cell.parameters()])])
    assert_close(found[0], found[1])


def test_in_single_precision_too(generator: torch.Generator) -> None:
    cell, x = CELLS["lstm"](INPUTS, HIDDEN), torch.randn(B, T, INPUTS, generator=generator)
    start = {part: torch.randn(B, HIDDEN, generator=generator) for part in cell.names}
    fast, slow = cell.before(x, start)[0], torch.stack([state["h"] for state in cell.run(cell.project(x), start)[:-1]], 1)
    found = [[h, *torch.autograd.grad(h.square().sum(), list(cell.parameters()))] for h in (fast, slow)]
    assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
