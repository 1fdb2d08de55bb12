"""The programs as methods of a model: which tensors each takes and gives, and its body for the very schemas of the native calls.

The request parameter `method` picks one (a static model's default is encode; a filter has only filter). Every other parameter is a
field of the native call, checked where the native call checks it. Tensors become the large fields: x is `inputs` or `frames`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from models.artifact import Card
from service.body import describe
from service.columns import level_arrays
from service.errors import InvalidInput
from service.oip.wire import X, check_shape
from service.posterior import beyond_lambda

Arrays = Mapping[str, NDArray[Any]]
LARGE = frozenset({"inputs", "frames", "mask", "posterior", "between", "return"})
"""Fields of native bodies that are tensors here (or the outputs named), and so no parameters."""


@dataclass(frozen=True)
class Input:
    """A tensor that a method takes. `shape` has the row axis, −1; `datatype` is what is documented: numbers of any kind are taken."""

    name: str
    shape: tuple[int, ...]
    datatype: str = "FP32"
    required: bool = False


@dataclass(frozen=True)
class Method:
    """One method: what it takes, and how tensors become the fields of its body."""

    name: str
    inputs: Callable[[Card], tuple[Input, ...]]
    fields: Callable[[Arrays, Card], dict[str, Any]]

    def body(self, inputs: Arrays, parameters: Mapping[str, Any], card: Card) -> dict[str, Any]:
        """The native call's body.

        Raises:
            InvalidInput: an input is unknown, missing, or of a shape that no native body has.
        """
        known = {one.name: one for one in self.inputs(card)}
        for name, array in inputs.items():
            if name not in known:
                raise InvalidInput.at(f"inputs.{name[:40]}", f"{self.name} takes {', '.join(known) or 'no tensors'}")
            if (array.dtype == object) != (known[name].datatype == "BYTES"):
                raise InvalidInput.at(f"inputs.{name}", f"must be {known[name].datatype}")
            if name not in (X, "mask"):
                check_shape(array, known[name].shape, f"inputs.{name}")
        for one in known.values():
            if one.required and one.name not in inputs:
                raise InvalidInput.at(f"inputs.{one.name}", f"is required by {self.name}")
        for name in parameters.keys() & LARGE:
            raise InvalidInput.at(f"parameters.{name}", "is no parameter: send it as a tensor, or name outputs")
        return dict(parameters) | self.fields(inputs, card)


@contextmanager
def spoken_as_tensors(parameters: Mapping[str, Any]) -> Iterator[None]:
    """Errors of native fields name what the request has: `parameters.steps` for `steps`, the tensor `x` for `inputs` or `frames`, the
    tensor `carry` for that of a posterior."""
    try:
        yield
    except InvalidInput as exc:
        fields = [(_as_sent(path, parameters), message) for path, message in exc.fields]
        if fields == list(exc.fields):
            raise
        raise InvalidInput("; ".join(f"{path}: {message}" for path, message in fields), fields=fields) from exc


def _as_sent(path: str, parameters: Mapping[str, Any]) -> str:
    """inputs[0][3] as x[0][3]; the protocol's own paths (inputs[0].shape, inputs.mu) as they are."""
    if re.split(r"[.\[]", path, maxsplit=1)[0] in parameters:
        return f"parameters.{path}"
    if of_posterior := re.fullmatch(r"posterior(\[\d+\])\.(carry|step)", path):
        return of_posterior[2] + of_posterior[1]
    for native in ("inputs", "frames"):
        if path == native or (path.startswith(f"{native}[") and "." not in path):
            return X + path.removeprefix(native)
    return path


def methods_of(card: Card) -> dict[str, Method]:
    """By name, the default in front."""
    methods = (FILTER,) if card.family == "filter" else STATIC
    return {method.name: method for method in methods}


def default_method(card: Card) -> str:
    """What a request gets that names no method."""
    return next(iter(methods_of(card)))


def method_named(name: Any, card: Card) -> Method:
    """The method that the parameter `method` names.

    Raises:
        InvalidInput: there is no such method.
    """
    methods = methods_of(card)
    if not isinstance(name, str) or name not in methods:
        given = f'"{name[:40]}"' if isinstance(name, str) else describe(name)
        raise InvalidInput.at("parameters.method", f"{card.name} has no method {given}: one of {', '.join(methods)}")
    return methods[name]


def _observed(card: Card) -> tuple[Input, ...]:
    return Input(X, (-1, *card.x.shape), required=True), Input("mask", (-1, *card.x.shape))


def _posterior_inputs(card: Card, *, required: bool) -> tuple[Input, ...]:
    kept = beyond_lambda(card)
    return (
        *(Input(name, (-1, size), required=required) for name, (_, size) in level_arrays(card).items()),
        Input("step", (-1,), "INT64"),
        *((Input("carry", (-1,), "BYTES", required=required and card.iterative),) if kept else ()),
    )


def _refined(card: Card) -> tuple[Input, ...]:
    return (*_observed(card), *_posterior_inputs(card, required=True))


def _reconstructed(card: Card) -> tuple[Input, ...]:
    return (*(replace(one, required=False) for one in _observed(card)), *_posterior_inputs(card, required=False))


def _between(card: Card) -> tuple[Input, ...]:
    return tuple(Input(name, (2, size)) for name, (_, size) in level_arrays(card).items())


def _x_fields(inputs: Arrays, card: Card) -> dict[str, Any]:
    return {native: inputs[name] for native, name in (("inputs", X), ("mask", "mask")) if name in inputs}


def _frame_fields(inputs: Arrays, card: Card) -> dict[str, Any]:
    return {native: inputs[name] for native, name in (("frames", X), ("mask", "mask")) if name in inputs}


def _posterior_fields(inputs: Arrays, card: Card) -> dict[str, Any]:
    posterior = _posteriors(inputs, card)
    return _x_fields(inputs, card) | ({"posterior": posterior} if posterior else {})


def _between_fields(inputs: Arrays, card: Card) -> dict[str, Any]:
    posterior = _posteriors(inputs, card)
    return {"between": posterior} if posterior else {}


def _posteriors(inputs: Arrays, card: Card) -> list[dict[str, Any]]:
    """One posterior per row, as a native reply gives it; none where no tensor of one came.

    Raises:
        InvalidInput: some of its tensors are missing, or they have different numbers of rows.
    """
    names = level_arrays(card)
    given = [name for name in (*names, "step", "carry") if name in inputs]
    if not given:
        return []
    for name in names:
        if name not in inputs:
            raise InvalidInput.at(f"inputs.{name}", f"is required where {given[0]} is given: a posterior has {', '.join(names)}")
    rows = len(inputs[given[0]])
    for name in given:
        if len(inputs[name]) != rows:
            raise InvalidInput.at(f"inputs.{name}", f"has {len(inputs[name])} rows, {given[0]} has {rows}")
    shown = iter(names)
    levels = [{parameter: inputs[next(shown)].tolist() for parameter in level.parameters} for level in card.levels]
    steps = inputs["step"].tolist() if "step" in inputs else [0] * rows
    carries = inputs["carry"].tolist() if "carry" in inputs else None
    return [
        {"step": steps[row], "levels": [{name: values[row] for name, values in level.items()} for level in levels]}
        | ({} if carries is None else {"carry": carries[row]})
        for row in range(rows)
    ]


STATIC = (
    Method("encode", _observed, _x_fields),
    Method("refine", _refined, _posterior_fields),
    Method("reconstruct", _reconstructed, _posterior_fields),
    Method("score", _observed, _x_fields),
    Method("generate", _between, _between_fields),
)
FILTER = Method("filter", _observed, _frame_fields)
