"""Recurrent cells as plain tensor operations, so that they trace, export and differentiate like everything else here.

A cell's input part, `project`, does not depend on its state: over a known sequence it is one matrix product.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Cell(nn.Module, ABC):
    """state_t = advance(project(input_t), state_{t−1}). `names`: the arrays of its state, each (B, hidden); h is its output."""

    names: tuple[str, ...] = ("h",)
    gates: int

    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        self.hidden = hidden
        self.input = nn.Linear(inputs, self.gates * hidden)
        self.recurrent = nn.Linear(hidden, self.gates * hidden, bias=False)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -1 / math.sqrt(hidden), 1 / math.sqrt(hidden))

    def project(self, inputs: Tensor) -> Tensor:
        """(..., inputs) -> (..., gates · hidden)."""
        return self.input(inputs)

    @abstractmethod
    def advance(self, projected: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The next state from this step's projected input (B, gates · hidden)."""


class LSTMCell(Cell):
    """Hochreiter & Schmidhuber 1997 with forget gates that start open: c′ = σ(f) c + σ(i) tanh(g), h′ = σ(o) tanh(c′)."""

    names = ("h", "c")
    gates = 4

    def __init__(self, inputs: int, hidden: int):
        super().__init__(inputs, hidden)
        with torch.no_grad():
            self.input.bias[hidden : 2 * hidden] += 1.0

    def advance(self, projected: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        # added after the split: TorchScript merges a sum of two products into one of concatenated factors, and fails when they
        # differ in width
        a, w = (gates.split([3 * self.hidden, self.hidden], -1) for gates in (projected, self.recurrent(state["h"])))
        opened, g = torch.sigmoid(a[0] + w[0]), torch.tanh(a[1] + w[1])
        i, f, o = opened.split(self.hidden, -1)
        c = f * state["c"] + i * g
        return {"h": o * torch.tanh(c), "c": c}


class GRUCell(Cell):
    """Cho 2014, the reset gate after the product: h′ = u h + (1 − u) tanh(a + r (W h))."""

    gates = 3

    def advance(self, projected: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        h = state["h"]
        a, w = projected.split([2 * self.hidden, self.hidden], -1), self.recurrent(h).split([2 * self.hidden, self.hidden], -1)
        u, r = torch.sigmoid(a[0] + w[0]).split(self.hidden, -1)
        return {"h": u * h + (1 - u) * torch.tanh(a[1] + r * w[1])}


CELLS: dict[str, type[Cell]] = {"lstm": LSTMCell, "gru": GRUCell}
