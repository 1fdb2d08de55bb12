"""Piano rolls in a file of their own: this project's .npz, the original MATLAB files, the original pickles.

A roll is (T, 88) uint8 of 0 and 1; column k is MIDI note 21 + k (A0 to C8); a frame may be empty. Only the splits asked
for are read, except from a pickle, which can only be read whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.data.errors import DataError, reason
from training.data.ragged import Ragged
from training.data.readers.npz import read_arrays
from training.data.readers.restricted_pickle import read_plain_pickle

LOWEST_NOTE, NOTES = 21, 88
Roll = NDArray[np.uint8]


def read_rolls(path: Path, splits: Iterable[str]) -> list[Ragged]:
    """The rolls of each split ("train", "valid", "test") from a .npz, .mat, .pickle or .pkl file.

    Raises:
        DataError: another kind of file, damaged, without one of the splits, or with something that is no piano roll.
    """
    readers = {".npz": _read_npz, ".mat": _read_mat, ".pickle": _read_pickle, ".pkl": _read_pickle}
    try:
        reader = readers[path.suffix.lower()]
    except KeyError:
        raise DataError(f"{path}: piano rolls are read from {', '.join(readers)}") from None
    return reader(path, tuple(splits))


def roll_of(steps: Iterable[Iterable[int]]) -> Roll:
    """(T, 88) from the MIDI notes that sound at each step.

    Raises:
        ValueError: a note outside 21 to 108, or no number.
    """
    listed = [list(notes) for notes in steps]
    roll = np.zeros((len(listed), NOTES), np.uint8)
    for step, notes in enumerate(listed):
        for note in notes:
            if not isinstance(note, int) or not LOWEST_NOTE <= note < LOWEST_NOTE + NOTES:
                raise ValueError(f"step {step}: {note!r} is no MIDI note from {LOWEST_NOTE} to {LOWEST_NOTE + NOTES - 1}")
            roll[step, note - LOWEST_NOTE] = 1
    return roll


def _read_npz(path: Path, splits: tuple[str, ...]) -> list[Ragged]:
    """Arrays `<split>` (F, 88) joined and `<split>_lengths` (N,)."""
    arrays = read_arrays(path, *splits, *(f"{split}_lengths" for split in splits))
    return [Ragged(_checked(arrays[split], path), arrays[f"{split}_lengths"].astype(np.int64)) for split in splits]


def _read_mat(path: Path, splits: tuple[str, ...]) -> list[Ragged]:
    """MATLAB 5: 1 x N cell arrays `traindata`, `validdata`, `testdata` of (T, 88)."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    names = [f"{split}data" for split in splits]
    try:
        arrays = loadmat(path, variable_names=names)
        return [Ragged.of(_checked(roll, path) for roll in arrays[name].ravel()) for name in names]
    except KeyError as exc:
        raise DataError(f"{path}: no cell array {exc}") from exc
    except (OSError, ValueError, TypeError, NotImplementedError, MatReadError) as exc:
        raise DataError(f"{path}: not a readable MATLAB 5 file of piano rolls: {reason(exc)}") from exc


def _read_pickle(path: Path, splits: tuple[str, ...]) -> list[Ragged]:
    """A dict of split -> list of sequences -> list of steps -> list or tuple of MIDI notes."""
    content = read_plain_pickle(path)
    if not isinstance(content, dict) or not set(splits) <= set(content):
        raise DataError(f"{path}: not a dict with the keys {', '.join(splits)}")
    try:
        return [Ragged.of(roll_of(sequence) for sequence in content[split]) for split in splits]
    except (TypeError, ValueError) as exc:
        raise DataError(f"{path}: not lists of MIDI notes: {reason(exc)}") from exc


def _checked(roll: Any, path: Path) -> Roll:
    """`roll` as uint8, if it is one."""
    array = np.asarray(roll)
    if array.ndim != 2 or array.shape[1] != NOTES or array.dtype.kind not in "bui" or not np.isin(array, (0, 1)).all():
        raise DataError(f"{path}: a piano roll is (T, {NOTES}) of 0 and 1, not {array.dtype} {array.shape}")
    return array.astype(np.uint8)
