"""Recurrent cells as plain tensor operations, so that they trace, export and differentiate like everything else here.

A cell's input part, `project`, does not depend on its state: over a known sequence it is one matrix product.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


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

    def run(self, projected: Tensor, state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """The T + 1 states over known projected inputs (B, T, gates · hidden)."""
        states = [{name: state[name] for name in self.names}]
        for inputs in projected.unbind(1):
            states.append(self.advance(inputs, states[-1]))
        return states

    def before(self, inputs: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """h before each of T known inputs (B, T, inputs), (B, T, hidden), and the state after the last."""
        states = self.run(self.project(inputs), state)
        return torch.stack([one["h"] for one in states[:-1]], 1), states[-1]


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

    def run(self, projected: Tensor, state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        h, c = _LSTMRun.apply(projected, self.recurrent.weight, state["h"], state["c"])
        return [state, *({"h": now, "c": cell} for now, cell in zip(h.unbind(0), c.unbind(0), strict=True))]

    def before(self, inputs: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """On a CPU in full precision by torch's own LSTM, which is half as long about it but does not tell c between inputs."""
        if inputs.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return super().before(inputs, state)
        weights = [_torch_order(part) for part in (self.input.weight, self.recurrent.weight, self.input.bias)]
        weights.append(torch.zeros_like(weights[-1]))
        h, c = (state[name].contiguous().unsqueeze(0) for name in self.names)
        outputs, h_last, c_last = torch.lstm(inputs.transpose(0, 1).contiguous(), (h, c), weights, True, 1, 0.0, True, False, False)
        return torch.cat([h, outputs[:-1]]).transpose(0, 1), {"h": h_last[0], "c": c_last[0]}


def _torch_order(gates: Tensor) -> Tensor:
    """Rows of gates i, f, o, g in torch's order i, f, g, o."""
    i, f, o, g = gates.chunk(4)
    return torch.cat([i, f, g, o])


class _LSTMRun(Function):
    """An LSTM over T known inputs, with its backward pass by hand: autograd would make the recurrent weights' gradient of T
    products with B rows each, and add up T arrays of their size; here it is one product with T · B rows.

    Matrix products run in the precision in which `projected` comes (under autocast that of the product it was made by).
    """

    @staticmethod
    def forward(ctx: Any, projected: Tensor, weight: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """projected: (B, T, 4 · hidden). weight: (4 · hidden, hidden). Gives h and c after each input, (T, B, hidden)."""
        hidden, matrix = weight.shape[1], weight.to(projected.dtype)
        hs, cs, opened, gs = [h], [c], [], []
        for a in projected.unbind(1):
            pre = (a + nn.functional.linear(hs[-1].to(matrix.dtype), matrix)).to(h.dtype)
            opened.append(torch.sigmoid(pre[:, : 3 * hidden]))
            gs.append(torch.tanh(pre[:, 3 * hidden :]))
            i, f, o = opened[-1].split(hidden, -1)
            cs.append(f * cs[-1] + i * gs[-1])
            hs.append(o * torch.tanh(cs[-1]))
        h_all, c_all = torch.stack(hs), torch.stack(cs)
        ctx.save_for_backward(matrix, h_all, c_all, torch.stack(opened), torch.stack(gs))
        ctx.precisions = projected.dtype, weight.dtype
        # copies: what is saved must not be what is given out
        return h_all[1:].clone(), c_all[1:].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        matrix, h_all, c_all, opened, g = ctx.saved_tensors
        hidden, (given, kept) = matrix.shape[1], ctx.precisions
        i, f, o = opened.split(hidden, -1)
        slopes, tanh_c = opened * (1 - opened), torch.tanh(c_all[1:])
        # what ∂c sends into i and f, into g, and what ∂h sends into o and c: of all steps at once
        into_if = slopes[..., : 2 * hidden] * torch.cat([g, c_all[:-1]], -1)
        into_g, into_o, into_c = i * (1 - g.square()), slopes[..., 2 * hidden :] * tanh_c, o * (1 - tanh_c.square())
        pre = torch.empty(*opened.shape[:2], 4 * hidden, dtype=opened.dtype, device=opened.device)
        dh, dc = torch.zeros_like(h_all[0]), torch.zeros_like(h_all[0])
        for t in reversed(range(len(g))):
            dh, dc = dh + grads[0][t], dc + grads[1][t]
            dc = torch.addcmul(dc, dh, into_c[t])
            pre[t, :, : 2 * hidden] = into_if[t] * dc.repeat(1, 2)
            pre[t, :, 2 * hidden : 3 * hidden] = into_o[t] * dh
            pre[t, :, 3 * hidden :] = into_g[t] * dc
            dh, dc = (pre[t].to(matrix.dtype) @ matrix).to(dc.dtype), dc * f[t]
        rows = pre.to(matrix.dtype)
        weight = rows.flatten(0, 1).mT @ h_all[:-1].to(matrix.dtype).flatten(0, 1)
        return rows.transpose(0, 1).to(given), weight.to(kept), dh, dc


class GRUCell(Cell):
    """Cho 2014, the reset gate after the product: h′ = u h + (1 − u) tanh(a + r (W h))."""

    gates = 3

    def advance(self, projected: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        h = state["h"]
        a, w = projected.split([2 * self.hidden, self.hidden], -1), self.recurrent(h).split([2 * self.hidden, self.hidden], -1)
        u, r = torch.sigmoid(a[0] + w[0]).split(self.hidden, -1)
        return {"h": u * h + (1 - u) * torch.tanh(a[1] + r * w[1])}


CELLS: dict[str, type[Cell]] = {"lstm": LSTMCell, "gru": GRUCell}
