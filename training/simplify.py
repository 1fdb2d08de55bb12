"""A traced graph without the work that its outputs do not need.

Reverse-mode differentiation of a sum starts from ones, spreads them over every axis that was reduced, and holds on to the
value it differentiates. An inference engine would run all of that. Here the graph is rebuilt node by node:

- a tensor filled with one number is that number, so ones, their expansions and products with them vanish, and with them
  the objective's own value, which only they referred to;
- an expanded tensor stays unexpanded as long as only elementwise arithmetic reads it, which broadcasts anyway;
- equal calls on equal arguments are one call; x · 1, x¹, (x · a) · b and (eˣ − 1) + 1 are what they seem; one size of a view is inferred.

The results are the same to rounding: factors are multiplied in another order, nothing else changes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

aten = torch.ops.aten

ARITHMETIC: dict[Any, Callable[..., float]] = {
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), operator.mul),
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), operator.add),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), operator.sub),
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar), operator.truediv),
    aten.neg.default: operator.neg,
}
PRODUCT = (aten.mul.Tensor, aten.mul.Scalar)
SUM = (aten.add.Tensor, aten.add.Scalar)
RANK_CHANGES = (aten.unsqueeze.default, aten.squeeze.dim)
FILLED: dict[Any, float] = {aten.ones_like.default: 1.0, aten.zeros_like.default: 0.0}

Value = fx.Node | float | int
"""What stands for a node of the old graph: a new node, perhaps of a smaller shape that broadcasts to the old one's, the
number that fills it, or a size known at tracing."""


def simplify(module: fx.GraphModule, dynamic: Collection[str]) -> fx.GraphModule:
    """The same function of the same inputs, from a graph that `make_fx` traced with symbolic shapes.

    Args:
        dynamic: the symbols of sizes that vary from call to call. Every other size is what it was at tracing.
    """
    graph = _Rebuilt(module.graph, frozenset(dynamic)).graph
    graph.eliminate_dead_code()
    return fx.GraphModule(module, graph)


class _Rebuilt:
    def __init__(self, old: fx.Graph, dynamic: frozenset[str]):
        self._dynamic = dynamic
        self.graph = fx.Graph()
        self._values: dict[fx.Node, Value] = {}
        self._calls: dict[str, fx.Node] = {}
        self._sizes: dict[str, fx.Node] = {}
        self._shapes = next(node.meta["val"].fake_mode for node in old.nodes if node.op == "placeholder")
        for node in old.nodes:
            if node.op == "call_function":
                self._values[node] = self._rebuild(node)
            elif node.op == "output":
                self.graph.output(map_arg(node.args[0], self._whole))
            else:
                self._values[node] = self.graph.node_copy(node, self._whole)

    def _rebuild(self, node: fx.Node) -> Value:
        size = node.meta.get("val")
        known = int(size) if isinstance(size, torch.SymInt) and not self._varies(size) else FILLED.get(node.target)
        if known is not None:
            return known
        if node.target in ARITHMETIC and not node.kwargs:
            return self._arithmetic(node)
        first = self._values.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        if first is not None and node.target is aten.expand.default and _rank(first) in (0, _rank(node)):
            return first
        if first is not None and node.target in RANK_CHANGES and _rank(first) in (0, _rank(node.args[0])):
            return first if _rank(first) == 0 else self._call(node.target, (first, *node.args[1:]))
        if node.target is aten.pow.Tensor_Scalar and node.args[1] == 1 and first is not None:
            return first
        return self._copy(node)

    def _copy(self, node: fx.Node) -> fx.Node:
        args: Any = map_arg(node.args, self._whole)
        if node.target in (aten.view.default, aten._unsafe_view.default):
            args = (args[0], _one_inferred(args[1]))
        new = self._call(node.target, args, node.kwargs, node.meta.get("val"))
        if isinstance(node.meta.get("val"), torch.SymInt):
            self._sizes[str(node.meta["val"])] = new
        return new

    def _arithmetic(self, node: fx.Node) -> Value:
        args: list[Any] = [self._values[arg] if isinstance(arg, fx.Node) else arg for arg in node.args]
        numbers = [isinstance(arg, int | float) for arg in args]
        if all(numbers):
            return float(ARITHMETIC[node.target](*args))
        if numbers[0] and node.target in (*PRODUCT, *SUM):
            args.reverse()
        elif numbers[0]:
            args[0] = self._call(aten.full.default, ([], float(args[0])), {"dtype": node.meta["val"].dtype})
        if isinstance(args[-1], int | float):
            if node.target in PRODUCT:
                return self._product(node.target, args[0], args[1])
            if node.target in SUM:
                return self._sum(node.target, args[0], args[1])
        return self._call(node.target, tuple(args))

    def _product(self, target: Any, value: fx.Node, factor: float) -> fx.Node:
        inner: Any = value.args
        if value.target in PRODUCT and isinstance(inner[1], int | float):
            value, factor = inner[0], inner[1] * factor
        if factor == 1:
            return value
        return self._call(aten.neg.default, (value,)) if factor == -1 else self._call(target, (value, factor))

    def _sum(self, target: Any, value: fx.Node, term: float) -> fx.Node:
        if term == 1 and value.target is aten.expm1.default:
            return self._call(aten.exp.default, value.args)
        if value.target is aten.neg.default:
            return self._call(aten.rsub.Scalar, (value.args[0], term))
        return self._call(target, (value, term))

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: Any = None, value: Any = None) -> fx.Node:
        """The node that calls `target`, made once for equal arguments."""
        key = f"{target} {args} {dict(kwargs or {})}"
        if key not in self._calls:
            node = self.graph.call_function(target, args, dict(kwargs or {}))
            if value is None:
                # shapes of new nodes come from running the call on the traced shapes
                with self._shapes:
                    value = target(*map_arg(args, lambda n: n.meta["val"]), **(kwargs or {}))
            node.meta["val"] = value
            self._calls[key] = node
        return self._calls[key]

    def _whole(self, node: fx.Node) -> Value:
        """What stands for `node`, in its full shape."""
        value, like = self._values[node], node.meta.get("val")
        if not isinstance(like, Tensor) or (isinstance(value, fx.Node) and _shape(value) == _shape(node)):
            return value
        sizes = [self._size(size) if self._varies(size) else int(size) for size in like.shape]
        if isinstance(value, fx.Node):
            return self._call(aten.expand.default, (value, sizes), None, like)
        return self._call(aten.full.default, (sizes, value), {"dtype": like.dtype}, like)

    def _varies(self, size: int | torch.SymInt) -> bool:
        return isinstance(size, torch.SymInt) and any(str(symbol) in self._dynamic for symbol in size.node.expr.free_symbols)

    def _size(self, size: int | torch.SymInt) -> fx.Node:
        """A node that gives this symbolic size: a computed one, else an input's."""
        if str(size) not in self._sizes:
            inputs = [node for node in self.graph.nodes if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor)]
            self._sizes[str(size)] = next(
                self._call(aten.sym_size.int, (node, axis), None, size)
                for node in inputs
                for axis, found in enumerate(node.meta["val"].shape)
                if str(found) == str(size)
            )
        return self._sizes[str(size)]


def _one_inferred(sizes: list[Any]) -> list[Any]:
    """The sizes of a view with its first symbolic one left to be inferred: its value need not be computed."""
    symbolic = [i for i, size in enumerate(sizes) if isinstance(size, fx.Node)]
    return [-1 if i == symbolic[0] else size for i, size in enumerate(sizes)] if symbolic and -1 not in sizes else sizes


def _shape(node: fx.Node) -> list[str]:
    return [str(size) for size in node.meta["val"].shape]


def _rank(value: Any) -> int:
    return len(value.meta["val"].shape) if isinstance(value, fx.Node) else 0
