"""The carry string: exact, bound to its artifact, and refused whenever it is not what this model wrote."""

from __future__ import annotations

import base64
import contextlib

import numpy as np
import pytest

from models.artifact import TensorSpec
from service.carry import CarryError, pack, unpack

SPECS = (TensorSpec(name="hidden", shape=("rows", 3)), TensorSpec(name="count", shape=("rows",), dtype="int64"))
ARRAYS = {"hidden": np.asarray([1.5, -2.25, 1e-30], np.float32), "count": np.asarray(2**40)}
SHA = "ab" * 32


def test_arrays_come_back_bit_for_bit():
    back = unpack(pack(ARRAYS, SHA), SPECS, SHA)
    for name, array in ARRAYS.items():
        assert np.array_equal(back[name], array)
        assert back[name].dtype == array.dtype


def test_another_artifact_refuses_it():
    with pytest.raises(CarryError, match="another model or version"):
        unpack(pack(ARRAYS, SHA), SPECS, "cd" * 32)


def test_other_arrays_are_refused():
    renamed = (SPECS[0].model_copy(update={"name": "hiddem"}), SPECS[1])
    with pytest.raises(CarryError, match="hiddem"):
        unpack(pack(ARRAYS, SHA), renamed, SHA)
    wider = (SPECS[0].model_copy(update={"shape": ("rows", 4)}), SPECS[1])
    with pytest.raises(CarryError, match="characters"):
        unpack(pack(ARRAYS, SHA), wider, SHA)


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(CarryError, match="not finite"):
        unpack(pack(ARRAYS | {"hidden": np.asarray([0, np.nan, 0], np.float32)}, SHA), SPECS, SHA)


@pytest.mark.parametrize("position", range(0, 60, 7))
def test_an_altered_byte_never_raises_anything_but_a_carry_error(position):
    raw = bytearray(base64.urlsafe_b64decode(pack(ARRAYS, SHA)))
    raw[position % len(raw)] ^= 0xFF
    with contextlib.suppress(CarryError):
        unpack(base64.urlsafe_b64encode(bytes(raw)).decode(), SPECS, SHA)


@pytest.mark.parametrize("text", ["", "a", "é" * 88, "====", "A" * 10_000])
def test_nonsense_is_refused(text):
    with pytest.raises(CarryError):
        unpack(text, SPECS, SHA)
