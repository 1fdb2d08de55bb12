"""Rows of small whole numbers take a short way into an array: what comes out, and what is refused, is the same."""

from typing import Any

import numpy as np
import pytest

from models.artifact import XSpec
from service import arrays
from service.errors import InvalidInput

X = XSpec(shape=(4,), dtype="float32", minimum=0.0, maximum=300.0, units="nats")
ROWS: list[Any] = [
    [[0, 1, 0, 1]],
    [[0, 1, 0, 1], [255, 3, 2, 1]],
    [[True, False, 1, 0]],
    [[256, 1, 2, 3]],
    [[0, 1.5, 2, 3]],
    [[-1, 0, 0, 0]],
    [[0, 1, 0]],
    [[0, 1, 0, 1], [1]],
    [[]],
    [[0, "1", 0, 1]],
    [[0, None, 0, 1]],
    [[0, [1], 0, 1]],
    [0, 1, 0, 1],
    [2],
    ["ab"],
    [[0, 10**30, 0, 1]],
]


@pytest.mark.parametrize("value", ROWS, ids=str)
def test_the_short_way_and_the_long_way_agree(monkeypatch: pytest.MonkeyPatch, value: Any) -> None:
    def outcome() -> Any:
        try:
            return arrays.read_rows(value, "inputs", X, 10).tolist()
        except InvalidInput as error:
            return str(error), error.fields

    short = outcome()
    monkeypatch.setattr(arrays, "_bytes", lambda _: None)
    assert short == outcome()


def test_bytes_are_read_as_the_numbers_they_are() -> None:
    read = arrays.read_rows([list(range(252, 256))], "inputs", X, 10)
    assert read.dtype == np.float32
    assert read.tolist() == [[252.0, 253.0, 254.0, 255.0]]
