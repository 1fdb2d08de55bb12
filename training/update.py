"""The gradients of one update, eager or compiled: the same arithmetic, the same noise, one signature.

Compiled, the whole of `accumulate` (K decoder passes forward and back, K calls of f, φ's backward) is traced once into a
flat graph of tensor operations and handed to torch's compiler, which fuses the elementwise work that takes a third of the
eager time. Nothing is differentiated at run time. On a GPU the compiled update is replayed as one CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from models.catalogue import LatentModel
from models.objective import Noise
from training.step import Seen, accumulate

Autocast = Callable[[], AbstractContextManager[object]]


class Gradients:
    """Puts the gradients of one update on the parameters of `model` and returns what was seen after 0 … K steps.

    Args:
        autocast: makes the context in which matrices may run at reduced precision.
        late, linked: as `accumulate` has them.
        compiled: trace and compile at the first call; every later call must have the same shapes. On a GPU what a call returns, and
            the gradients it leaves, hold until the next call.
    """

    def __init__(
        self, model: LatentModel, refinement_steps: int, autocast: Autocast, compiled: bool, late: bool = False, linked: int | None = None
    ):
        self._model, self._autocast = model, autocast
        self._parameters = dict(model.named_parameters())
        self._update = _Accumulate(model, refinement_steps, len(model.generative.latent_sizes), late, linked)
        self._compiled: Callable[..., list[Tensor]] | None = None
        self._wants_compiled = compiled

    def __call__(self, x: Tensor, mask: Tensor, noise: list[Noise], kl_weight: float) -> list[Seen]:
        """x, mask: (B, X). noise: K + 1 draws (direct: 1), each (B, S, D) per level."""
        weight = torch.tensor(kl_weight, device=x.device)
        flat = [part for draw in noise for part in draw]
        if not self._wants_compiled:
            with self._autocast():
                return _seen(self._update(x, mask, weight, flat))
        values = [parameter.detach() for parameter in self._parameters.values()]
        if self._compiled is None:
            # a plain function: fx would count the `self` of a bound method as an argument
            pure = make_fx(lambda *args: self._pure(*args))  # noqa: PLW0108
            graph = pure(values, x, mask, weight, flat)
            self._compiled = torch.compile(graph, fullgraph=True, options={"triton.cudagraphs": True} if x.is_cuda else None)
        if x.is_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            outputs = self._compiled(values, x, mask, weight, flat)
        for parameter, gradient in zip(self._parameters.values(), outputs, strict=False):
            parameter.grad = gradient
        return _seen(outputs[len(self._parameters) :])

    def _pure(self, values: list[Tensor], x: Tensor, mask: Tensor, weight: Tensor, noise: list[Tensor]) -> list[Tensor]:
        """The update without side effects: parameters in, their gradients and the trace out."""
        leaves = [value.detach().requires_grad_() for value in values]
        swapped = {f"model.{name}": leaf for name, leaf in zip(self._parameters, leaves, strict=True)}
        with torch.enable_grad(), self._autocast():
            trace = functional_call(self._update, swapped, (x, mask, weight, noise))
        return [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves] + trace


class _Accumulate(nn.Module):
    """`accumulate` as a module, so that `functional_call` can put other parameters in."""

    def __init__(self, model: LatentModel, refinement_steps: int, levels: int, late: bool, linked: int | None):
        super().__init__()
        self.model, self.refinement_steps, self.levels, self.late, self.linked = model, refinement_steps, levels, late, linked

    def forward(self, x: Tensor, mask: Tensor, kl_weight: Tensor, noise: list[Tensor]) -> list[Tensor]:
        draws = iter(zip(*(noise[level :: self.levels] for level in range(self.levels)), strict=True))
        trace = accumulate(self.model, x, mask, self.refinement_steps, lambda: next(draws), kl_weight, self.late, self.linked)
        return [part for seen in trace for part in (seen.elbo, seen.log_likelihood, seen.grad_mu, seen.grad_log_sigma)]


def _seen(flat: list[Tensor]) -> list[Seen]:
    return [Seen(*flat[i : i + 4]) for i in range(0, len(flat), 4)]
