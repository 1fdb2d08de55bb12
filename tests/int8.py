"""Whether this processor multiplies uint8 by int8 exactly. One without VNNI adds pairs of products in 16 bits, where they saturate: there
an artifact's int8 programs are refused at load (docs/decisions/precision.md), and what they promise cannot be tested."""

from __future__ import annotations

import functools

import numpy as np
import pytest


@functools.cache
def saturates() -> bool:
    """False too where onnx, with which one product is made to find out, is not installed."""
    try:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        return False
    weights = numpy_helper.from_array(np.full((64, 16), 127, np.int8), "w")
    inputs = [helper.make_tensor_value_info("a", TensorProto.UINT8, [1, 64])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.INT32, [1, 16])]
    graph = helper.make_graph([helper.make_node("MatMulInteger", ["a", "w"], ["y"])], "product", inputs, outputs, [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"a": np.full((1, 64), 255, np.uint8)})
    return bool((found != 64 * 255 * 127).any())


needs_exact_int8 = pytest.mark.skipif("__import__('tests.int8').int8.saturates()", reason="products of int8 saturate on this processor")
"""A condition in text: it is looked at when a test is about to run, not where it is collected."""
