"""Many lengths in one array."""

from __future__ import annotations

import numpy as np
import pytest

from training.data import DataError
from training.data.ragged import Ragged

ARRAYS = [np.full((length, 2), number, np.uint8) for number, length in enumerate((3, 1, 4))]


def test_a_ragged_is_the_list_of_its_arrays() -> None:
    ragged = Ragged.of(ARRAYS)
    assert (len(ragged), ragged.frames, ragged.lengths.tolist(), ragged.offsets.tolist()) == (3, 8, [3, 1, 4], [0, 3, 4, 8])
    for row, array in zip(ragged, ARRAYS, strict=True):
        np.testing.assert_array_equal(row, array)
    np.testing.assert_array_equal(ragged[-1], ARRAYS[2])
    with pytest.raises(IndexError):
        ragged[3]


def test_indexing_gives_a_view_and_slicing_another_ragged() -> None:
    ragged = Ragged.of(ARRAYS)
    assert np.shares_memory(ragged[1], ragged.joined)
    assert ragged[1:].lengths.tolist() == [1, 4]
    assert ragged.take(np.array([2, 0])).joined[:, 0].tolist() == [2] * 4 + [0] * 3


def test_a_sequence_without_frames_is_left_out() -> None:
    assert Ragged.of([ARRAYS[0], ARRAYS[0][:0]]).lengths.tolist() == [3]
    with pytest.raises(DataError, match="no sequence has a frame"):
        Ragged.of([])


def test_lengths_must_fit_the_frames_and_widths_each_other() -> None:
    with pytest.raises(DataError, match="add up to 5, the array has 4"):
        Ragged(ARRAYS[2], np.array([2, 3]))
    with pytest.raises(DataError, match="none without frames"):
        Ragged(ARRAYS[2], np.array([4, 0]))
    with pytest.raises(DataError, match="differ in the width"):
        Ragged.of([ARRAYS[0], np.zeros((2, 3), np.uint8)])
