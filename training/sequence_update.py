"""The gradients of one update on a chunk of frames, eager or compiled: the same arithmetic, the same noise, one signature.

What cannot be batched over frames, the chain of z (training/sequence_step.py), is compiled: one frame is traced into a flat
graph of tensor operations, in which nothing is differentiated at run time, and reused for every frame and chunk. A graph of
a whole chunk would be no faster and take T times as long to compile (docs/log.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from models.catalogue import FilterModel
from models.generative.filter import FilterState
from training.sequence_step import ChainFrame, Chunk, ChunkSeen, Flow, accumulate_sequence, chain_frame

Autocast = Callable[[], AbstractContextManager[object]]
Key = tuple[int, bool]

SIGHTINGS = 2
"""A chunk shape is compiled for when it comes for the second time: the odd last batch is not worth the wait."""


class SequenceGradients:
    """Adds the gradients of one update to the parameters of `model` and returns what was seen.

    Args:
        autocast: makes the context in which matrices may run at reduced precision.
        compiled: compile the frames of a refining model's chain. Calls with other numbers of rows remain possible.
    """

    def __init__(self, model: FilterModel, autocast: Autocast, compiled: bool):
        self._model, self._autocast = model, autocast
        self._chains: dict[Key, ChainFrame] = {}
        self._seen: Counter[Key] = Counter()
        self._wants_compiled = compiled and model.inference.refines

    def __call__(self, chunk: Chunk, kl_weight: float) -> ChunkSeen:
        with self._autocast():
            return accumulate_sequence(self._model, chunk, kl_weight, self._chain(chunk))

    def _chain(self, chunk: Chunk) -> ChainFrame | None:
        if not self._wants_compiled:
            return None
        key = (len(chunk.x), chunk.needs_filling)
        self._seen[key] += 1
        if key not in self._chains and self._seen[key] >= SIGHTINGS:
            self._chains[key] = compile_frame(self._model, chunk, self._autocast)
        return self._chains.get(key)


def compile_frame(model: FilterModel, chunk: Chunk, autocast: Autocast) -> ChainFrame:
    """`chain_frame` for chunks of this shape, compiled; the weights are read anew at every call."""
    parameters = dict(model.named_parameters())
    frame = _Frame(model, chunk.needs_filling)

    def pure(
        values: list[Tensor], state: FilterState, x: Tensor, mask: Tensor, noise: Tensor, kl_weight: Tensor
    ) -> tuple[FilterState, Flow]:
        swapped = {f"model.{name}": value for name, value in zip(parameters, values, strict=True)}
        with torch.no_grad(), autocast():
            after, flow = functional_call(frame, swapped, (state, x, mask, noise, kl_weight))
        # a compiled function's outputs are its own arrays
        return {name: value + 0 for name, value in after.items()}, flow

    values = [parameter.detach() for parameter in parameters.values()]
    state = {name: value.detach().contiguous() for name, value in model.generative.start(len(chunk.x)).items()}
    example = (state, chunk.x[:, 0].contiguous(), chunk.mask[:, 0].contiguous(), chunk.noise[0], chunk.x.new_ones(()))
    compiled = torch.compile(make_fx(lambda *arguments: pure(*arguments))(values, *example), fullgraph=True)  # noqa: PLW0108

    def run(state: FilterState, x: Tensor, mask: Tensor, noise: Tensor, kl_weight: Tensor) -> tuple[FilterState, Flow]:
        # of one layout, so that the graph is compiled once
        state = {name: value.detach().contiguous() for name, value in state.items()}
        return compiled(values, state, x.contiguous(), mask.contiguous(), noise, kl_weight)

    return run


class _Frame(nn.Module):
    """`chain_frame` as a module, so that `functional_call` can put other parameters in."""

    def __init__(self, model: FilterModel, fill: bool):
        super().__init__()
        self.model, self.fill = model, fill

    def forward(self, state: FilterState, x: Tensor, mask: Tensor, noise: Tensor, kl_weight: Tensor) -> tuple[FilterState, Flow]:
        return chain_frame(self.model, state, x, mask, noise, kl_weight, fill=self.fill)
