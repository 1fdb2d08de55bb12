"""A program as a graph of plain tensor operations, and that one graph as TorchScript and as ONNX.

`torch.func.grad` inside a program is traced away by `make_fx`: the graph holds the backward pass as ordinary operations,
with a symbolic number of rows and samples and without the parts that no output needs (simplify.py), and needs no autograd
when it runs. TorchScript gets the graph with its weights left empty (the loader fills them from weights.safetensors); ONNX
refers to the same file by offset, and gets the graph in the operators that its runtime is good at (onnx_graph.py).
"""

from __future__ import annotations

import io
import json
import struct
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from models.artifact import WEIGHTS
from models.catalogue import FilterModel, LatentModel
from models.programs import Program
from training.onnx_graph import suit_onnx_runtime
from training.simplify import simplify

aten = torch.ops.aten
TRACE_SIZES = {"rows": 47, "samples": 53}
"""Sizes at tracing: distinct, more than 1 so that no dimension is taken for a constant, and primes that no layer has for
its width: tracing takes dimensions of equal size for the same one."""


def weight_attribute(name: str) -> str:
    """The attribute of a TorchScript module that holds the weight called `name` in weights.safetensors."""
    return "weight__" + name.replace(".", "__")


def example_inputs(program: Program, sizes: dict[str, int] = TRACE_SIZES, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Zeros of every input's shape."""
    return [torch.zeros([sizes[size] if isinstance(size, str) else size for size in spec.shape], dtype=dtype) for spec in program.inputs]


class _Call(nn.Module):
    """A program as a module whose parameters are the model's."""

    def __init__(self, model: LatentModel | FilterModel, program: Program):
        super().__init__()
        self.model, self.program = model, program

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.program.function(*inputs)


def trace(model: LatentModel | FilterModel, program: Program) -> tuple[fx.GraphModule, list[str]]:
    """The graph, and the names of the weights it uses: its first inputs, before the program's own."""
    call = _Call(model, program)
    weights = {name: value.detach() for name, value in model.named_parameters()}

    def run(values: list[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        return functional_call(call, {f"model.{name}": value for name, value in zip(weights, values, strict=True)}, inputs)

    with torch.no_grad():
        graph = make_fx(lambda *flat: run(list(flat[: len(weights)]), *flat[len(weights) :]), tracing_mode="symbolic")(
            *weights.values(), *example_inputs(program)
        )
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"][len(weights) :]
    shapes = [(spec.shape, node.meta["val"].shape) for spec, node in zip(program.inputs, inputs, strict=True)]
    dynamic = {str(traced) for shape, sizes in shapes for size, traced in zip(shape, sizes, strict=True) if isinstance(size, str)}
    graph = simplify(graph, dynamic)
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    used = []
    for node, name in zip(placeholders, weights, strict=False):
        if node.users:
            used.append(name)
        else:
            graph.graph.erase_node(node)
    graph.recompile()
    return graph, used


def to_torchscript(graph: fx.GraphModule, used: list[str]) -> bytes:
    """The graph scripted, with an empty attribute in the place of every weight."""
    module = fx.GraphModule(nn.Module(), _copy(graph.graph))
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    for node, name in zip(placeholders, used, strict=False):
        attribute = weight_attribute(name)
        module.register_buffer(attribute, torch.empty(0))
        with module.graph.inserting_before(node):
            node.replace_all_uses_with(module.graph.get_attr(attribute))
        module.graph.erase_node(node)
    for node in module.graph.nodes:
        if node.op == "call_function":
            node.target = aten.size if node.target is aten.sym_size.int else getattr(node.target, "overloadpacket", node.target)
    module.recompile()
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        # about fx.GraphModule's own attributes
        warnings.filterwarnings("ignore", "The TorchScript type system", UserWarning)
        torch.jit.save(torch.jit.script(module), buffer)
    return buffer.getvalue()


class _WithWeights(nn.Module):
    """The graph with its weights as parameters under their own names, for torch.export."""

    def __init__(self, graph: fx.GraphModule, weights: dict[str, Tensor]):
        super().__init__()
        self.graph = graph
        self.names = {name: weight_attribute(name) for name in weights}
        for name, value in weights.items():
            self.register_buffer(self.names[name], value)

    def forward(self, *inputs: Tensor) -> Any:
        return self.graph(*(getattr(self, attribute) for attribute in self.names.values()), *inputs)


def to_onnx(
    graph: fx.GraphModule, used: list[str], model: LatentModel | FilterModel, program: Program, offsets: dict[str, tuple[int, int]]
) -> bytes:
    """The graph as ONNX whose initialisers point into weights.safetensors (`offsets`: name -> (first byte, bytes))."""
    from onnx.external_data_helper import set_external_data

    parameters = dict(model.named_parameters())
    module = _WithWeights(suit_onnx_runtime(graph), {name: parameters[name].detach() for name in used})
    dimensions = {size: torch.export.Dim(size, min=1) for size in TRACE_SIZES}
    shapes = [{axis: dimensions[size] for axis, size in enumerate(spec.shape) if isinstance(size, str)} for spec in program.inputs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(module, tuple(example_inputs(program)), dynamic_shapes=(tuple(shapes),), strict=False)
        converted = torch.onnx.export(exported, dynamo=True, optimize=False, verbose=False)
    assert converted is not None
    proto = converted.model_proto
    attributes = {weight_attribute(name): name for name in used}
    for initializer in proto.graph.initializer:
        name = next((weight for attribute, weight in attributes.items() if initializer.name.endswith(attribute)), None)
        if name is not None:
            first, count = offsets[name]
            # set_external_data wants raw data to be there; only its place is kept
            set_external_data(initializer, location=WEIGHTS, offset=first, length=count)
            initializer.ClearField("raw_data")
            initializer.ClearField("float_data")
    del proto.metadata_props[:]
    for node in proto.graph.node:
        # source lines of the exporting machine: half the file, and nobody's business
        del node.metadata_props[:]
        node.doc_string = ""
    return proto.SerializeToString()


def safetensors_offsets(file: Path) -> dict[str, tuple[int, int]]:
    """name -> (first byte in the file, number of bytes) of every tensor."""
    with file.open("rb") as handle:
        (header,) = struct.unpack("<Q", handle.read(8))
        entries = json.loads(handle.read(header))
    return {
        name: (8 + header + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in entries.items()
        if name != "__metadata__"
    }


def _copy(graph: fx.Graph) -> fx.Graph:
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    return copy
