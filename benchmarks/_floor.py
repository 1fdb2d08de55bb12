"""The least time that one step of the served model can take on this machine, measured here and now.

    floor = max(weight bytes / bandwidth,  operations / matrix rate)

Matrix products of a step, with R rows and S samples: each decoder layer forward on R·S rows (bias included) and backward
to its input on R·S rows, each layer of the refiner on R rows. `operations / matrix rate` is the time that these products
take alone, at these very shapes, one after another, in the faster of both libraries: one ONNX graph of nothing but them
(constant weights, bound outputs, less an empty call), and torch into given outputs with the weights in either layout.
Weights are distinct, so the caches see the step's true working set; a decoder weight is read twice a step, forward and
backward, with megabytes of others between. Bandwidth is what streaming over these same bytes reaches, by the fastest of
three reductions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from _timing import time_in_turn

from models.catalogue import LatentModel

Call = Callable[[], object]


@dataclass(frozen=True)
class Product:
    """(rows, inputs) @ (inputs, outputs), plus a bias or not."""

    rows: int
    inputs: int
    outputs: int
    bias: bool

    @property
    def operations(self) -> int:
        return 2 * self.rows * self.inputs * self.outputs

    @property
    def weight_bytes(self) -> int:
        return 4 * self.inputs * self.outputs


@dataclass(frozen=True)
class Floor:
    """µs of one step; what each library needs for its products alone, µs; GFLOP/s over the products; GB/s."""

    us: float
    matrix_us: float
    reading_us: float
    gflops: float
    bandwidth_gbs: float
    by_library_us: dict[str, float]


def step_products(model: LatentModel, rows: int, samples: int) -> list[Product]:
    """The matrix products of one step."""
    parameters = dict(model.named_parameters())
    # embed_x belongs to init: it is computed once
    shapes = {name: weight.shape for name, weight in parameters.items() if weight.ndim == 2 and "embed_x" not in name}
    decoder = [shape for name, shape in shapes.items() if name.startswith("generative")]
    refiner = [(shape, name.replace("weight", "bias") in parameters) for name, shape in shapes.items() if name.startswith("inference")]
    forward = [Product(rows * samples, i, o, True) for o, i in decoder]
    backward = [Product(rows * samples, o, i, False) for o, i in reversed(decoder)]
    return [*forward, *backward, *(Product(rows, i, o, bias) for (o, i), bias in refiner)]


def measure_floor(products: Sequence[Product], threads: int, seconds: float) -> Floor:
    """Runs everything in turn for about `seconds`."""
    calls = {
        "onnxruntime": _in_onnxruntime(products, threads),
        "torch": _in_torch(products, transposed=False),
        "torch, transposed": _in_torch(products, transposed=True),
    }
    (empty,) = _time_in_turn([_in_onnxruntime([Product(1, 1, 1, False)], threads)], seconds * 0.05)
    times = dict(zip(calls, _time_in_turn(list(calls.values()), seconds * 0.75), strict=True))
    times["onnxruntime"] -= empty
    bandwidth = _bandwidth(products, seconds * 0.2)
    matrix, reading = min(times.values()), sum(p.weight_bytes for p in products) / bandwidth
    rate = sum(p.operations for p in products) / matrix
    by_library = {name: 1e6 * value for name, value in times.items()}
    return Floor(1e6 * max(matrix, reading), 1e6 * matrix, 1e6 * reading, rate / 1e9, bandwidth / 1e9, by_library)


def _in_onnxruntime(products: Sequence[Product], threads: int) -> Call:
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    nodes, inputs, outputs, weights = [], [], [], []
    for i, p in enumerate(products):
        inputs.append(helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, [p.rows, p.inputs]))
        outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [p.rows, p.outputs]))
        weights.append(numpy_helper.from_array(_normal(p.inputs, p.outputs), f"w{i}"))
        if p.bias:
            weights.append(numpy_helper.from_array(_normal(p.outputs), f"b{i}"))
        nodes.append(helper.make_node("Gemm" if p.bias else "MatMul", [f"x{i}", f"w{i}", *([f"b{i}"] if p.bias else [])], [f"y{i}"]))
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    graph = helper.make_graph(nodes, "products", inputs, outputs, weights)
    raw = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    session = ort.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for i, p in enumerate(products):
        binding.bind_ortvalue_input(f"x{i}", ort.OrtValue.ortvalue_from_numpy(_normal(p.rows, p.inputs)))
        binding.bind_ortvalue_output(f"y{i}", ort.OrtValue.ortvalue_from_numpy(_normal(p.rows, p.outputs)))
    return lambda: session.run_with_iobinding(binding)


def _in_torch(products: Sequence[Product], transposed: bool) -> Call:
    calls = [_torch_call(product, transposed) for product in products]

    def run() -> None:
        for call in calls:
            call()

    return run


def _torch_call(product: Product, transposed: bool) -> Call:
    x, out = torch.from_numpy(_normal(product.rows, product.inputs)), torch.empty(product.rows, product.outputs)
    weight = torch.from_numpy(_normal(product.inputs, product.outputs))
    weight = weight.t().contiguous().t() if transposed else weight
    if not product.bias:
        return lambda: torch.mm(x, weight, out=out)
    bias = torch.from_numpy(_normal(product.outputs))
    return lambda: torch.addmm(bias, x, weight, out=out)


def _bandwidth(products: Sequence[Product], seconds: float) -> float:
    """Bytes per second of reading all weights of a step once."""
    weights = [torch.from_numpy(_normal(p.inputs, p.outputs)) for p in products]
    flat = [weight.view(-1) for weight in weights]
    vectors = [torch.ones(p.outputs) for p in products]
    passes: list[Call] = [
        lambda: [weight.sum() for weight in flat],
        lambda: [torch.dot(weight, weight) for weight in flat],
        lambda: [torch.mv(weight, vector) for weight, vector in zip(weights, vectors, strict=True)],
    ]
    return sum(p.weight_bytes for p in products) / min(_time_in_turn(passes, seconds))


def _time_in_turn(calls: Sequence[Call], seconds: float) -> list[float]:
    """Median seconds of each call, in blocks, in turn until the time is over."""
    named = {str(i): call for i, call in enumerate(calls)}
    return [1e-6 * us for us in time_in_turn(named, seconds).values()]


_generator = np.random.default_rng(0)


def _normal(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return _generator.standard_normal(shape, np.float32)
