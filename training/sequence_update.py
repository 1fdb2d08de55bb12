"""The gradients of one update on a chunk of frames, eager or compiled: the same arithmetic, the same noise, one signature.

What cannot be batched over frames, the chain of z (training/sequence_step.py), is compiled: one frame is traced into a flat
graph of tensor operations, in which nothing is differentiated at run time, and reused for every frame and chunk. A graph of
a whole chunk would be no faster and take T times as long to compile (docs/log.md). Where x alone decides the core's states, what
θ and φ learn from all frames at once is a second graph; the core itself and its backward pass stay as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from models.catalogue import FilterModel
from models.generative.filter import FilterState
from models.objective import ElboTerms
from training.sequence_step import ChainFrame, Chunk, ChunkSeen, Flow, Learn, accumulate_sequence

Key = tuple[int, ...]
"""What the shapes of a compiled part depend on."""

SIGHTINGS = 2
"""A chunk shape is compiled for when it comes for the second time: the odd last batch is not worth the wait."""


class SequenceGradients:
    """Adds the gradients of one update to the parameters of `model` and returns what was seen. On a GPU the compiled parts are CUDA graphs,
    a frame's one for each frame of a chunk, and the gradients hold until the next call.

    Args:
        precision: of the matrix products, as torch.autocast takes it; None = that of the model. All else stays as it is.
        compiled: compile the frames of a refining model's chain. Calls with other numbers of rows remain possible.
        later_frames: as `accumulate_sequence` has it.
    """

    def __init__(self, model: FilterModel, precision: torch.dtype | None = None, compiled: bool = True, later_frames: bool = False):
        self._model, self._precision, self._later_frames = model, precision, later_frames
        self._frames: dict[Key, CompiledFrame] = {}
        self._lessons: dict[Key, CompiledLesson] = {}
        self.compilations = 0
        """How many parts were compiled: an update that raised it took long."""
        self._seen: Counter[tuple[object, ...]] = Counter()
        self._wants_compiled = compiled and model.inference.refines

    def __call__(self, chunk: Chunk, kl_weight: float) -> ChunkSeen:
        if not self._wants_compiled:
            with autocast(chunk.x.device, self._precision):
                return accumulate_sequence(self._model, chunk, kl_weight, later_frames=self._later_frames)
        if chunk.x.is_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        with autocast(chunk.x.device, self._precision):
            seen = accumulate_sequence(self._model, chunk, kl_weight, _Faster(self, chunk), later_frames=self._later_frames)
        # a graph's outputs hold until the next update, which may go on from the state
        return replace(seen, state={name: value.clone() for name, value in seen.state.items()}) if chunk.x.is_cuda else seen

    def frame(self, chunk: Chunk, frame: ChainFrame) -> ChainFrame:
        """`frame`, compiled once chunks of this shape have come often enough."""
        key = (len(chunk.x), chunk.noise.shape[1], chunk.needs_filling)
        if key not in self._frames and self._often(key):
            self._frames[key] = CompiledFrame(self._model, frame, self._precision)
        return self._frames[key].chain() if key in self._frames else frame

    def learn(self, chunk: Chunk, learn: Learn) -> Learn:
        """`learn`, likewise."""
        key = (*chunk.weights.shape, chunk.noise.shape[1])
        if key not in self._lessons and self._often(("learn", *key)):
            self._lessons[key] = CompiledLesson(self._model, learn, self._precision)
        return self._lessons.get(key, learn)

    def _often(self, key: tuple[object, ...]) -> bool:
        self._seen[key] += 1
        often = self._seen[key] >= SIGHTINGS
        self.compilations += often
        return often


@dataclass(frozen=True)
class _Faster:
    """The compiled parts for one chunk."""

    gradients: SequenceGradients
    chunk: Chunk

    def frame(self, frame: ChainFrame) -> ChainFrame:
        return self.gradients.frame(self.chunk, frame)

    def learn(self, learn: Learn) -> Learn:
        return self.gradients.learn(self.chunk, learn)


def autocast(device: torch.device, precision: torch.dtype | None) -> AbstractContextManager[object]:
    # without the cache: a cast made under no_grad would be reused, without its gradient, where one is needed
    return nullcontext() if precision is None else torch.autocast(device.type, precision, cache_enabled=False)


class CompiledFrame:
    """A frame of `model`'s chain for chunks of one shape, compiled at its first call. `chain()` gives it with the weights as they
    are now."""

    def __init__(self, model: FilterModel, frame: ChainFrame, precision: torch.dtype | None):
        self._parameters = dict(model.named_parameters())
        self._precision = precision
        # the weights of matrix products are rounded, and turned, once per chunk: autocast would do it again for every frame
        linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        self._matrices = [name for name in self._parameters if name in linear]
        self._turned = set(self._matrices)
        """Those that the frame reads the other way: all of them until it is traced."""
        self._frame = _Part(model, frame)
        self._compiled: Callable[..., tuple[FilterState, Flow]] | None = None

    def chain(self) -> ChainFrame:
        values = self._values()
        by_name = dict(zip(self._parameters, values, strict=True))
        # one that the graph does not read stands in for itself
        turned = [by_name[name].t().contiguous() if name in self._turned else by_name[name] for name in self._matrices]

        def run(state: FilterState, x: Tensor, mask: Tensor, noise: Tensor, kl_weight: Tensor) -> tuple[FilterState, Flow]:
            # of one layout, so that the graph is compiled once; the graph has its casts inside
            inputs = (values, turned, _plain(state), x.contiguous(), mask.contiguous(), noise.contiguous(), kl_weight)
            with torch.autocast(x.device.type, enabled=False):
                if self._compiled is None:
                    self._compiled = compile_graph(self._traced(*inputs), x.device)
                return self._compiled(*inputs)

        return run

    def _traced(self, *inputs: Any) -> fx.GraphModule:
        """The frame as a graph in which every matrix is read in the order it lies in: a product with a few rows and a matrix that
        lies the other way takes about twice as long."""
        traced = make_fx(lambda *inputs: self._pure(*inputs))(*inputs)  # noqa: PLW0108
        given = [node for node in traced.graph.nodes if node.op == "placeholder"]
        matrices = [node for node, name in zip(given, self._parameters, strict=False) if name in self._matrices]
        turned = dict(zip(matrices, given[len(self._parameters) :], strict=False))
        other = turned | {that: this for this, that in turned.items()}
        for node in list(traced.graph.nodes):
            if node.target is torch.ops.aten.t.default and node.args[0] in other:
                node.replace_all_uses_with(other[node.args[0]])
                traced.graph.erase_node(node)
        traced.recompile()
        self._turned = {name for name, node in zip(self._matrices, turned.values(), strict=True) if node.users}
        return traced

    def _values(self) -> list[Tensor]:
        return [
            value.detach().to(self._precision) if self._precision is not None and name in self._matrices else value.detach()
            for name, value in self._parameters.items()
        ]

    def _pure(self, values: list[Tensor], turned: list[Tensor], *inputs: Any) -> tuple[FilterState, Flow]:
        swapped = {f"model.{name}": value for name, value in zip(self._parameters, values, strict=True)}
        with torch.no_grad(), autocast(inputs[1].device, self._precision):
            after, flow = functional_call(self._frame, swapped, inputs)
        # a compiled function's outputs are its own arrays
        return {name: value + 0 for name, value in after.items()}, flow


class CompiledLesson:
    """`learn_foreseen` of `model` for chunks of one shape, compiled at its first call, with the weights as they are at each."""

    def __init__(self, model: FilterModel, learn: Learn, precision: torch.dtype | None):
        self._parameters = dict(model.named_parameters())
        self._precision = precision
        self._lesson = _Part(model, learn)
        self._compiled: Callable[..., tuple[list[Tensor | None], dict[str, Tensor | None], Tensor, Tensor]] | None = None

    def __call__(
        self, known: dict[str, Tensor], x: Tensor, mask: Tensor, weights: Tensor, noise: Tensor, flow: Flow, kl_weight: Tensor
    ) -> ElboTerms:
        values = [value.detach() for value in self._parameters.values()]
        # of one layout, like a frame's
        plain = [value.contiguous() for value in (x, mask, weights, noise)]
        given = (values, _plain(known), *plain, _plain(flow), kl_weight)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            if self._compiled is None:
                # a plain function: fx would count the `self` of a bound method as an argument
                self._compiled = compile_graph(make_fx(lambda *given: self._pure(*given))(*given), x.device)  # noqa: PLW0108
            found, arrived, log_likelihood, kl = self._compiled(*given)
        for parameter, gradient in zip(self._parameters.values(), found, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        for name, gradient in arrived.items():
            known[name].grad = gradient
        return ElboTerms(log_likelihood, kl)

    def _pure(
        self, values: list[Tensor], known: dict[str, Tensor], *inputs: Any
    ) -> tuple[list[Tensor | None], dict[str, Tensor | None], Tensor, Tensor]:
        """Without side effects: parameters in, the gradients of those that get one out."""
        leaves = [
            value.detach().requires_grad_(parameter.requires_grad)
            for value, parameter in zip(values, self._parameters.values(), strict=True)
        ]
        ends = {name: value.detach().requires_grad_() for name, value in known.items()}
        swapped = {f"model.{name}": leaf for name, leaf in zip(self._parameters, leaves, strict=True)}
        with torch.enable_grad(), autocast(inputs[0].device, self._precision):
            terms = functional_call(self._lesson, swapped, (ends, *inputs))
        return [leaf.grad for leaf in leaves], {name: end.grad for name, end in ends.items()}, terms.log_likelihood, terms.kl


class _Part(nn.Module):
    """A part of an update as a module, so that `functional_call` can put other parameters into its model."""

    def __init__(self, model: FilterModel, part: Callable[..., Any]):
        super().__init__()
        self.model, self.part = model, part

    def forward(self, *inputs: Any) -> Any:
        return self.part(*inputs)


def _plain(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().contiguous() for name, value in values.items()}


def compile_graph(graph: fx.GraphModule, device: torch.device) -> Callable[..., Any]:
    """`graph` compiled for the shapes and layouts that it was traced with, to which whoever calls it keeps: guards that look at every
    input again cost as much as a product. On a CPU what calls the kernels is C++ too: a frame has some forty, and Python takes about
    5 µs for each."""
    options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    options |= {"triton.cudagraphs": True} if device.type == "cuda" else {"cpp_wrapper": True}
    return torch.compile(graph, fullgraph=True, options=options)
