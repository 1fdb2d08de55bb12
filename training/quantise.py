"""An ONNX program with its products with weights in int8, one scale per row and one per column: a row never sees its neighbours.

    a W + b  ≈  s_a s_W (â Ŵ) + b,     â = round(127 a / m), s_a = m / 127, m = max |a| of the row;     Ŵ, s_W the same for each column

â Ŵ is exact in int32, so a row in a batch gives the same bits as the row alone. The dynamic quantisation that comes with ONNX Runtime
takes one m for the whole array: there a row's answer depends on who shares the batch. Weights stay where they were, float32 in
weights.safetensors: Ŵ and s_W are plain operators on constants, which ONNX Runtime folds while it loads.

What is put together from parts (Concat: the gradient, its logarithms, λ) has a scale per part, since one for all would lose the small ones:

    [a₁ a₂] W  =  a₁ W₁ + a₂ W₂

â is stored as â + 128 in uint8, because uint8 × int8 is what processors multiply fastest. Everything but the products stays float32.

Shapes: R rows, K what is summed over, N columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

LARGEST = 127
SMALLEST = 1e-30
"""Of a scale: rows and columns of zeros are divided by it."""
RUNTIME = "com.microsoft"
"""The operators of ONNX Runtime's own: MatMulIntegerToFloat is MatMulInteger with the columns' scales applied on the way out."""
_PREFIX = "int8_"
_PLAIN = {"alpha": 1, "beta": 1, "transA": 0, "transB": 0}

Activations = Callable[["Int8Graph", str], tuple[str, str]]
"""(graph, name of a product's left side) -> names of it in uint8 with zero point 128, and of 127 times what one unit is worth."""


class NotQuantisable(ValueError):
    """A product has no weights, or is more than a product."""


class Int8Graph:
    """The nodes of the new graph, in order. What is asked for twice is made once."""

    def __init__(self, proto: onnx.ModelProto):
        self.graph = proto.graph
        self.nodes: list[Any] = []
        self._constants: set[str] = set()
        self._weights: dict[str, tuple[str, str]] = {}

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        """The output of a new node."""
        name = f"{_PREFIX}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=f"{name}_{op}", **attributes))
        return name

    def constant(self, name: str, value: Any) -> str:
        name = _PREFIX + name
        if name not in self._constants:
            self._constants.add(name)
            self.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def rows_of(self, name: str, first: int, end: int) -> str:
        """Some rows of a weight, (end − first, N)."""
        ends = [self.constant(f"at_{value}", np.array([value])) for value in (first, end, 0)]
        return self.add("Slice", name, *ends)

    def weight(self, name: str) -> tuple[str, str]:
        """(K, N) -> its int8 form, and what one unit of a column and of a row of scale 127 are worth together, (N,)."""
        if name not in self._weights:
            largest = self.add("ReduceMax", self.add("Abs", name), self.constant("columns", np.array([0])), keepdims=0)
            unit = self.constant("unit", np.float32(1 / LARGEST))
            scale = self.add("Mul", self.add("Max", largest, self.constant("smallest", np.float32(SMALLEST))), unit)
            rounded = self.add("Round", self.add("Div", name, scale))
            self._weights[name] = self.add("Cast", rounded, to=TensorProto.INT8), self.add("Mul", scale, unit)
        return self._weights[name]


def in_float32(proto: Any) -> None:
    """Rewrites the int8 products of `proto` in place as float32's, which are exact up to sums of 2²⁴ (K = 1,040): what a processor computes
    that neither saturates nor rounds, on any processor, slowly."""
    nodes = []
    for node in proto.graph.node:
        if node.op_type != "MatMulIntegerToFloat":
            nodes.append(node)
            continue
        values, weights, _, worth, zero = node.input
        name = node.output[0]
        steps = [
            ("Cast", [values], {"to": TensorProto.FLOAT}),
            ("Cast", [zero], {"to": TensorProto.FLOAT}),
            ("Sub", [f"{name}_0", f"{name}_1"], {}),
            ("Cast", [weights], {"to": TensorProto.FLOAT}),
            ("MatMul", [f"{name}_2", f"{name}_3"], {}),
        ]
        nodes += [helper.make_node(op, inputs, [f"{name}_{i}"], **attributes) for i, (op, inputs, attributes) in enumerate(steps)]
        nodes.append(helper.make_node("Mul", [f"{name}_4", worth], [name]))
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def per_row(graph: Int8Graph, name: str) -> tuple[str, str]:
    """Each row by its own largest magnitude, (R, K) and (R, 1). A row that holds a NaN has one for its scale, so its products are NaN."""
    rows = graph.constant("rows", np.array([-1]))
    magnitude = graph.add("Abs", name)
    # ReduceMax passes over a NaN; the mean does not, and is never more than the largest
    parts = [graph.add(op, magnitude, rows, keepdims=1) for op in ("ReduceMax", "ReduceMean")]
    largest = graph.add("Max", *parts, graph.constant("smallest", np.float32(SMALLEST)))
    unit, zero = graph.constant("unit", np.float32(1 / LARGEST)), graph.constant("zero", np.uint8(128))
    return graph.add("QuantizeLinear", graph.add("Div", name, largest), unit, zero), largest


def to_int8(proto: Any, activations: Activations = per_row) -> int:
    """Rewrites the ModelProto `proto` in place.

    Returns:
        How many products were changed; if none, the program stays what it was.

    Raises:
        NotQuantisable: a product's right side is no weight, or a Gemm scales or turns its factors.
    """
    graph = Int8Graph(proto)
    parts = _joined_columns(proto)
    weights = {initializer.name for initializer in proto.graph.initializer}
    quantised: dict[str, tuple[str, str]] = {}
    products = 0
    for node in proto.graph.node:
        if node.op_type == "Transpose" and node.input[0] in weights:
            weights.add(node.output[0])
        if node.op_type not in ("Gemm", "MatMul"):
            graph.nodes.append(node)
            continue
        left, right, *bias = node.input
        if right not in weights or any(helper.get_attribute_value(one) != _PLAIN[one.name] for one in node.attribute):
            raise NotQuantisable(f"{node.op_type} {node.output[0]}: int8 takes plain products with a weight on the right")
        total, first = "", 0
        for part, width in parts.get(left, [(left, 0)]):
            if part not in quantised:
                quantised[part] = activations(graph, part)
            rows = graph.rows_of(right, first, first + width) if width else right
            (values, scale), (columns, worth), one = quantised[part], graph.weight(rows), graph.constant("one", np.float32(1))
            product = graph.add("MatMulIntegerToFloat", values, columns, one, worth, graph.constant("zero", np.uint8(128)), domain=RUNTIME)
            term, first = graph.add("Mul", product, scale), first + width
            total = graph.add("Add", total, term) if total else term
        last, inputs = ("Add", [total, *bias]) if bias else ("Identity", [total])
        graph.nodes.append(helper.make_node(last, inputs, list(node.output), name=f"{node.output[0]}_int8"))
        products += 1
    if products:
        del proto.graph.node[:]
        proto.graph.node.extend(graph.nodes)
        if RUNTIME not in {opset.domain for opset in proto.opset_import}:
            proto.opset_import.append(helper.make_opsetid(RUNTIME, 1))
    return products


def _joined_columns(proto: Any) -> dict[str, list[tuple[str, int]]]:
    """Output of a Concat of columns -> (part, its width), where all widths are known."""
    inferred = onnx.shape_inference.infer_shapes(proto).graph
    last = {value.name: list(value.type.tensor_type.shape.dim) for value in (*inferred.value_info, *inferred.input)}
    found = {}
    for node in proto.graph.node:
        if node.op_type != "Concat" or helper.get_node_attr_value(node, "axis") not in (-1, len(last.get(node.output[0], [])) - 1):
            continue
        widths = [last[part][-1].dim_value if last.get(part) else 0 for part in node.input]
        if all(widths):
            found[node.output[0]] = list(zip(node.input, widths, strict=True))
    return found
