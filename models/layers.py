"""Building blocks whose derivatives are cheap in a forward-only graph.

The served `step` holds the decoder's backward pass as ordinary operations (architecture.md, section 3). ELU and softplus
are therefore given with derivatives that an inference engine has as one or two kernels: σ(x) for softplus, and for ELU
the derivative expressed by its own output, which is at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function


class _Elu(Function):
    """elu(a) = a for a > 0, e^a − 1 otherwise; elu′(a) = min(elu(a), 0) + 1."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor) -> Tensor:
        return nn.functional.elu(a)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (h,) = ctx.saved_tensors
        return grads[0] * (h.clamp(max=0) + 1)


class _Softplus(Function):
    """softplus(a) = log(1 + e^a) without overflow; its derivative is the logistic function."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor) -> Tensor:
        return a.clamp(min=0) + torch.log1p(torch.exp(-a.abs()))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (a,) = ctx.saved_tensors
        return grads[0] * torch.sigmoid(a)


def elu(a: Tensor) -> Tensor:
    return _Elu.apply(a)


def softplus(a: Tensor) -> Tensor:
    return _Softplus.apply(a)


class MLP(nn.Module):
    """Fully connected ELU layers, (..., inputs) -> (..., hidden[-1]).

    With `highway`, a layer between equal widths is t ⊙ elu(W h) + (1 − t) ⊙ h, t = σ(V h) (Srivastava 2015; used by
    Marino 2018's reference code for its encoders).
    """

    def __init__(self, inputs: int, hidden: Sequence[int], highway: bool = False):
        super().__init__()
        sizes = [inputs, *hidden]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.gates = nn.ModuleDict({str(i): nn.Linear(a, a) for i, a in enumerate(sizes[:-1]) if highway and a == sizes[i + 1]})
        self.output_size = sizes[-1]

    def forward(self, h: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            new = elu(layer(h))
            if str(i) in self.gates:
                carry = torch.sigmoid(self.gates[str(i)](h))
                new = carry * new + (1 - carry) * h
            h = new
        return h


def layer_norm(a: Tensor) -> Tensor:
    """Each row to mean 0 and variance 1 over its own features; continuous at zero, and zero there. No parameters."""
    return nn.functional.layer_norm(a, a.shape[-1:], eps=1e-5)
