"""Products in int8: the arithmetic that was meant, rows that do not see each other, and nothing that is silently wrong."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.int8 import needs_exact_int8
from training.quantise import NotQuantisable, in_float32, to_int8

ROWS, WIDTH, COLUMNS = 6, 37, 19
RNG = np.random.default_rng(0)
A = RNG.standard_normal((ROWS, WIDTH)).astype(np.float32) * np.logspace(-3, 3, ROWS, dtype=np.float32)[:, None]
W = RNG.standard_normal((COLUMNS, WIDTH)).astype(np.float32)
B = RNG.standard_normal(COLUMNS).astype(np.float32)


def program(*, bias: bool = True, **attributes: float) -> onnx.ModelProto:
    """a Wᵀ (+ b), then the product of that with W: the weight is used both ways, as a step uses the decoder's."""
    first = helper.make_node("Gemm" if bias else "MatMul", ["a", "turned", *["b"] * bias], ["y"], **attributes)
    nodes = [helper.make_node("Transpose", ["w"], ["turned"], perm=[1, 0]), first, helper.make_node("MatMul", ["y", "w"], ["back"])]
    inputs = [helper.make_tensor_value_info("a", TensorProto.FLOAT, ["rows", WIDTH])]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "back")]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(W, "w"), numpy_helper.from_array(B, "b")][: 1 + bias])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(proto: onnx.ModelProto, a: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(proto.SerializeToString(), options).run(None, {"a": a})


def product(a: np.ndarray, w: np.ndarray) -> np.ndarray:
    """What the module's equation says, in float64."""
    rows, columns = (np.abs(a).max(1, keepdims=True) / 127, np.abs(w).max(0) / 127)
    return np.round(a / rows) @ np.round(w / columns) * rows * columns


@needs_exact_int8
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_that_of_rows_and_columns_rounded_by_their_own_scales(bias: bool) -> None:
    proto = program(bias=bias)
    assert to_int8(proto) == 2
    assert {node.op_type for node in proto.graph.node}.isdisjoint({"MatMul", "Gemm"})
    y, back = run(proto, A)
    expected = product(A, W.T) + (B if bias else 0)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    np.testing.assert_allclose(back, product(y, W), rtol=1e-5, atol=1e-6 * np.abs(back).max())


def test_the_exact_form_is_what_was_meant_on_any_processor() -> None:
    proto = program()
    to_int8(proto)
    in_float32(proto)
    assert not any(node.op_type.startswith("MatMulInteger") for node in proto.graph.node)
    y, back = run(proto, A)
    expected = product(A, W.T) + B
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    np.testing.assert_allclose(back, product(y, W), rtol=1e-5, atol=1e-6 * np.abs(back).max())


@pytest.mark.parametrize(("axis", "known"), [(-1, True), (1, True), (-1, False)])
def test_what_is_put_together_has_a_scale_for_every_part(axis: int, known: bool) -> None:
    small = 12
    nodes = [helper.make_node("Concat", ["a", "c"], ["both"], axis=axis), helper.make_node("Gemm", ["both", "w", "b"], ["y"])]
    widths = (WIDTH - small, small) if known else ("n", "m")
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", width]) for name, width in zip("ac", widths, strict=True)]
    weights = [numpy_helper.from_array(W.T.copy(), "w"), numpy_helper.from_array(B, "b")]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], weights)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    assert to_int8(proto) == 1
    in_float32(proto)
    a, c = A[:, :-small], A[:, -small:] * np.float32(1e-4)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    (y,) = onnxruntime.InferenceSession(proto.SerializeToString(), options).run(None, {"a": a, "c": c})
    parts = product(a, W.T[:-small]) + product(c, W.T[-small:]) + B
    whole = product(np.concatenate([a, c], axis=1), W.T) + B
    np.testing.assert_allclose(y, parts if known else whole, rtol=1e-5, atol=1e-6 * np.abs(whole).max())
    assert np.abs(parts - whole).max() > 1e-3 * np.abs(whole).max(), "the two are told apart"


@needs_exact_int8
def test_it_stays_within_two_roundings_of_the_float_product() -> None:
    proto = program(bias=False)
    exact = run(proto, A)[0]
    to_int8(proto)
    half_a, half_w = np.abs(A).max(1, keepdims=True) / 254, np.abs(W).max(1) / 254
    bound = half_a * np.abs(W).sum(1) + half_w * np.abs(A).sum(1, keepdims=True) + WIDTH * half_a * half_w
    assert np.all(np.abs(run(proto, A)[0] - exact) <= 1.0001 * bound)


def test_a_row_has_the_same_bits_alone_and_beside_any_others() -> None:
    proto = program()
    to_int8(proto)
    together = run(proto, np.concatenate([A, 1e6 * A]))
    for row in range(ROWS):
        for value, alone in zip(together, run(proto, A[row : row + 1]), strict=True):
            assert np.array_equal(value[row], alone[0])


@pytest.mark.parametrize("place", [0, 3, WIDTH - 1])
@pytest.mark.parametrize("flaw", [np.nan, np.inf])
def test_a_row_that_is_not_finite_says_so_and_spoils_no_other(place: int, flaw: float) -> None:
    proto = program()
    to_int8(proto)
    a = A.copy()
    a[2, place] = flaw
    for value, clean in zip(run(proto, a), run(proto, A), strict=True):
        assert not np.isfinite(value[2]).any()
        others = np.arange(ROWS) != 2
        assert np.array_equal(value[others], clean[others])


def test_a_row_of_zeros_gives_the_bias() -> None:
    proto = program()
    to_int8(proto)
    assert np.array_equal(run(proto, np.zeros_like(A))[0], np.tile(B, (ROWS, 1)))


@pytest.mark.parametrize("attributes", [{"alpha": 0.5}, {"beta": 2.0}, {"transA": 1}])
def test_a_product_that_is_more_than_one_is_refused(attributes: dict[str, float]) -> None:
    with pytest.raises(NotQuantisable, match="Gemm y: int8 takes plain products with a weight on the right"):
        to_int8(program(**attributes))


def test_a_product_of_two_inputs_is_refused() -> None:
    proto = program()
    proto.graph.node[2].input[1] = "a"
    with pytest.raises(NotQuantisable, match="MatMul back"):
        to_int8(proto)


def test_a_program_without_products_stays_as_it_is() -> None:
    proto = program()
    del proto.graph.node[1:], proto.graph.output[:]
    proto.graph.output.append(helper.make_tensor_value_info("turned", TensorProto.FLOAT, None))
    before = proto.SerializeToString()
    assert to_int8(proto) == 0
    assert proto.SerializeToString() == before
