"""From JSON lists to float32 arrays: one conversion for all rows, and only when it fails a search for the offending element.

A numpy array (of a tensor body) takes the place of the lists anywhere: the checks and the messages are the same.

Shapes: R rows, X shape of x. A row may be flat (x.size numbers) or nested to x.shape.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from models.artifact import XSpec
from service.body import describe
from service.errors import InvalidInput

Float32 = NDArray[np.float32]
LARGEST = float(np.finfo(np.float32).max)


def read_rows(value: Any, field: str, x: XSpec, max_rows: int) -> Float32:
    """x of every row, (R, *X), finite and inside the card's bounds.

    Raises:
        InvalidInput: naming the first row or element that does not fit, and what would.
    """
    if _is_batch(value) and len(value) and isinstance(value[0], int | float | np.generic):
        shown = describe(_plain(value[0]))
        raise InvalidInput.at(f"{field}[0]", f"{shown} is not a row: {_wanted(x)}; for a single row send {field}: [[…]]")
    check_batch(value, field, max_rows)
    array = _shaped(value, field, x)
    minimum, maximum = (-LARGEST if x.minimum is None else x.minimum), (LARGEST if x.maximum is None else x.maximum)
    if not (minimum <= array.min() and array.max() <= maximum):  # written so that NaN fails
        inside = (array >= minimum) & (array <= maximum)
        _refuse_element(array, inside, value, field, f"outside {_interval(x)}")
    return np.ascontiguousarray(array, np.float32)


def read_mask(value: Any, x: XSpec, rows: int) -> Float32:
    """1 where x is observed, (R, *X); null stands for all observed."""
    if value is None:
        return np.ones((rows, *x.shape), np.float32)
    if not _is_batch(value) or len(value) != rows:
        given = f"{len(value)} rows" if _is_batch(value) else describe(_plain(value))
        raise InvalidInput.at("mask", f"must be null or have one row for each of the {rows} rows of inputs, got {given}")
    array = _shaped(value, "mask", x)
    binary = (array == 0) | (array == 1)
    if not binary.all():
        _refuse_element(array, binary, value, "mask", "neither 0 nor 1 (1 = observed)")
    return np.ascontiguousarray(array, np.float32)


def read_vectors(values: list[Any], paths: list[str], size: int, name: str) -> Float32:
    """One vector of `size` numbers per row, (R, size), finite in float32."""
    array = _numbers(values)
    if array is None or array.shape != (len(values), size) or any(bool in map(type, value) for value in values):
        for value, path in zip(values, paths, strict=True):
            _check_row(value, path, (size,), f"{name} has {size} numbers")
            for index, element in enumerate(value):
                if isinstance(element, bool):
                    raise InvalidInput.at(f"{path}[{index}]", f"{describe(element)} is not a number")
        raise InvalidInput.at(paths[0], f"is not {size} numbers")
    finite = np.abs(array) <= LARGEST
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        raise InvalidInput.at(f"{paths[row]}[{column}]", f"{array[row, column]:g} is not finite in float32")
    return np.ascontiguousarray(array, np.float32)


def check_batch(value: Any, field: str, max_rows: int) -> None:
    """`value` is a list of 1 … max_rows rows."""
    if not _is_batch(value):
        raise InvalidInput.at(field, f"must be a list of rows, not {describe(_plain(value))}")
    if not len(value):
        raise InvalidInput.at(field, "is empty: send at least one row")
    if len(value) > max_rows:
        raise InvalidInput.at(field, f"has {len(value)} rows, this server takes at most {max_rows} in one request")


def _is_batch(value: Any) -> bool:
    """A list, or an array with a first axis."""
    return value.ndim > 0 if isinstance(value, np.ndarray) else isinstance(value, list)


def _plain(value: Any) -> Any:
    """A number of numpy's as Python's own; everything else as it is."""
    return value.item() if isinstance(value, np.generic | np.ndarray) else value


def _numbers(value: Any) -> NDArray[Any] | None:
    """`value` as an array if it is a regular nest of numbers and booleans; a string or null anywhere makes it None."""
    if (small := _bytes(value)) is not None:
        return small
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):
        return None
    return array if array.dtype.kind in "fiub" else None


def _bytes(value: Any) -> NDArray[np.uint8] | None:
    """Flat rows of whole numbers from 0 to 255 (binary images, masks), four times as fast as numpy reads a list; None for all else."""
    if not isinstance(value, list) or not all(type(row) is list for row in value):
        return None
    try:
        rows = [bytes(row) for row in value]
    except (TypeError, ValueError):  # at the first number that is none of those
        return None
    size = len(rows[0]) if rows else 0
    if any(len(row) != size for row in rows):
        return None
    return np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), size)


def _shaped(value: Any, field: str, x: XSpec) -> NDArray[Any]:
    array = _numbers(value)
    if array is not None and array.shape[1:] == x.shape:
        return array
    if array is not None and array.shape[1:] == (x.size,):
        return array.reshape(len(value), *x.shape)
    # all rows of an array have one shape: what is wrong with the first is what is wrong
    _refuse_rows(value[:1].tolist() if isinstance(value, np.ndarray) else value, field, x)


def _refuse_rows(value: list[Any], field: str, x: XSpec) -> NoReturn:
    """Finds the first row that is not x.size numbers, flat or nested."""
    wanted = _wanted(x)
    for index, row in enumerate(value):
        path = f"{field}[{index}]"
        if not isinstance(row, list):
            raise InvalidInput.at(path, f"{describe(row)} is not a row: {wanted}")
        nested = len(x.shape) > 1 and any(isinstance(element, list) for element in row)
        _check_row(row, path, x.shape if nested else (x.size,), wanted)
    raise InvalidInput.at(field, "rows must all be flat or all be nested alike")


def _wanted(x: XSpec) -> str:
    nested = f" or a nest of {' × '.join(map(str, x.shape))}" if len(x.shape) > 1 else ""
    return f"this model takes {x.size} numbers per row{nested}"


def _check_row(row: Any, path: str, shape: tuple[int, ...], wanted: str) -> None:
    if not isinstance(row, list):
        raise InvalidInput.at(path, f"{describe(row)} is not a list: {wanted}")
    for index, element in enumerate(row):
        here = f"{path}[{index}]"
        if len(shape) > 1:
            _check_row(element, here, shape[1:], wanted)
        elif isinstance(element, list):
            raise InvalidInput.at(here, f"is a list, nested too deeply: {wanted}")
        elif not isinstance(element, int | float):
            raise InvalidInput.at(here, f"{describe(element)} is not a number")
    if len(row) != shape[0]:
        raise InvalidInput.at(path, f"has {len(row)} numbers, {wanted}" if len(shape) == 1 else f"has {len(row)} entries, {wanted}")


def _refuse_element(array: NDArray[Any], good: NDArray[np.bool_], value: Any, field: str, problem: str) -> NoReturn:
    """Names the first element of `array` where `good` is false, by the path the client wrote (flat or nested)."""
    index = np.argwhere(~good)[0]
    shown = array[tuple(index)]
    nested = value.ndim > 2 if isinstance(value, np.ndarray) else isinstance(value[0][0], list)
    if not nested:
        index = np.asarray([index[0], np.ravel_multi_index(tuple(index[1:]), array.shape[1:])])
    path = field + "".join(f"[{i}]" for i in index)
    raise InvalidInput.at(path, f"{shown:g} is {problem}")


def _interval(x: XSpec) -> str:
    low = "" if x.minimum is None else f"{x.minimum:g}"
    high = "" if x.maximum is None else f"{x.maximum:g}"
    return f"[{low}, {high}], the range of this model's x" if low or high else "the range of float32"
