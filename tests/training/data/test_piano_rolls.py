"""Piano rolls from each of their formats, and pickles that want more than they may."""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from training.data import DataError
from training.data.readers.piano_roll import read_rolls, roll_of
from training.data.readers.piano_streams import read_pieces, read_streams
from training.data.readers.restricted_pickle import read_plain_pickle

CHORALES = Path(__file__).resolve().parents[2] / "data/chorales_sample.npz"
SPLITS = ("train", "valid")


def notes_of(roll: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(int(note) + 21 for note in np.flatnonzero(frame)) for frame in roll]


def python2_int64(value: int) -> bytes:
    """A NumPy int64 as Python 2 pickles it: what the tuples of jsb-chorales-quarter.pkl hold."""
    dtype = b"cnumpy\ndtype\n(U\x02i8K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    return b"cnumpy.core.multiarray\nscalar\n(" + dtype + b"U\x08" + struct.pack("<q", value) + b"tR"


def python2_pickle(splits: dict[str, list[list[tuple[int, ...]]]]) -> bytes:
    """Protocol 2: a dict of split -> list of sequences -> list of tuples of int64."""

    def several(items: list[bytes], end: bytes) -> bytes:
        return b"(" + b"".join(items) + end

    def piece(steps: list[tuple[int, ...]]) -> bytes:
        return b"]" + several([several([python2_int64(note) for note in notes], b"t") for notes in steps], b"e")

    body = b"".join(
        b"U" + bytes([len(name)]) + name.encode() + b"]" + several([piece(steps) for steps in pieces], b"e")
        for name, pieces in splits.items()
    )
    return b"\x80\x02}(" + body + b"u."


def test_all_formats_of_the_same_rolls_are_read_alike(tmp_path: Path) -> None:
    original = read_rolls(CHORALES, SPLITS)
    cells = {f"{split}data": np.empty((1, len(part)), object) for split, part in zip(SPLITS, original, strict=True)}
    for split, part in zip(SPLITS, original, strict=True):
        cells[f"{split}data"][0] = list(part)
    savemat(tmp_path / "rolls.mat", cells)
    lists = {split: [notes_of(roll) for roll in part] for split, part in zip(SPLITS, original, strict=True)}
    (tmp_path / "python3.pickle").write_bytes(pickle.dumps(lists))
    (tmp_path / "python2.pkl").write_bytes(python2_pickle(lists))
    for name in ("rolls.mat", "python3.pickle", "python2.pkl"):
        for expected, part in zip(original, read_rolls(tmp_path / name, SPLITS), strict=True):
            np.testing.assert_array_equal(part.joined, expected.joined)
            np.testing.assert_array_equal(part.lengths, expected.lengths)
            assert part.joined.dtype == np.uint8


def test_numpy_integers_of_a_pickle_become_python_integers(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02](" + python2_int64(-3) + python2_int64(60) + b"e.")
    assert read_plain_pickle(tmp_path / "a.pkl") == [-3, 60]
    (tmp_path / "b.pkl").write_bytes(pickle.dumps([np.uint8(200), np.dtype(">i2").type(7)], protocol=4))
    assert read_plain_pickle(tmp_path / "b.pkl") == [200, 7]


class Power:
    """Pickles to a call of `function`."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("content", "name"),
    [
        (Power(print, "x"), "print"),
        (Power(eval, "1"), "eval"),
        (Power(getattr, [], "append"), "getattr"),
        (Power(np.load, "x"), "load"),
        (np.zeros(3), "numpy"),
        (Path("x"), "PosixPath"),
    ],
    ids=["print", "eval", "getattr", "np.load", "array", "path"],
)
def test_a_pickle_that_asks_for_more_than_plain_data_is_refused(tmp_path: Path, content: object, name: str, protocol: int) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(DataError, match=rf"refused: the pickle asks for .*{name}.*, but only plain lists"):
        read_plain_pickle(tmp_path / "a.pkl")


def test_nothing_is_called_by_a_refused_pickle(tmp_path: Path) -> None:
    """os.mkdir is reached by name and by the old INST instruction; neither makes the folder."""
    target = tmp_path / "made"
    for content in (f"cos\nmkdir\n(V{target}\ntR.", f"(V{target}\nios\nmkdir\n."):
        (tmp_path / "a.pkl").write_bytes(content.encode())
        with pytest.raises(DataError, match=r"os\.mkdir"):
            read_plain_pickle(tmp_path / "a.pkl")
    assert not target.exists()


@pytest.mark.parametrize(
    ("dtype", "reason"), [("O", "no plain integer"), ("f8", "no plain integer"), ("V9", "no plain integer"), ("i4", "a NumPy scalar")]
)
def test_only_integers_of_the_right_width_are_rebuilt(tmp_path: Path, dtype: str, reason: str) -> None:
    code = b"U" + bytes([len(dtype)]) + dtype.encode()
    content = b"\x80\x02cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(" + code + b"K\x00K\x01tRU\x0812345678tR."
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(DataError, match=reason):
        read_plain_pickle(tmp_path / "a.pkl")


def test_a_pickle_cannot_change_the_reader_itself(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02cnumpy\ndtype\n}U\x05CODESNsb.")
    with pytest.raises(DataError, match="not a readable pickle"):
        read_plain_pickle(tmp_path / "a.pkl")
    (tmp_path / "b.pkl").write_bytes(b"\x80\x02]" + python2_int64(60) + b"a.")
    assert read_plain_pickle(tmp_path / "b.pkl") == [60]


@pytest.mark.parametrize("cut", [0, 1, 20, 200, -1])
def test_a_damaged_pickle_is_refused(tmp_path: Path, cut: int) -> None:
    (tmp_path / "a.pkl").write_bytes(python2_pickle({"train": [[(60, 64), (62,)]]})[:cut])
    with pytest.raises(DataError, match="not a readable pickle"):
        read_plain_pickle(tmp_path / "a.pkl")


@pytest.mark.parametrize(
    "content",
    [[1], {"train": [[[60]]]}, {"train": [[[60]]], "valid": 3}, {"train": [[["60"]]], "valid": [[[60]]]}, {"train": [], "valid": []}],
)
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, content: object) -> None:
    (tmp_path / "a.pickle").write_bytes(pickle.dumps(content))
    with pytest.raises(DataError):
        read_rolls(tmp_path / "a.pickle", SPLITS)


def test_a_roll_has_the_notes_of_each_step() -> None:
    roll = roll_of([[21, 108], [], [60]])
    assert roll.shape == (3, 88)
    assert [np.flatnonzero(frame).tolist() for frame in roll] == [[0, 87], [], [39]]
    for wrong in (20, 109, 60.5, "60"):
        with pytest.raises(ValueError, match="no MIDI note"):
            roll_of([[wrong]])  # type: ignore[list-item]


def test_files_that_hold_no_rolls_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "grey.npz", train=np.full((2, 88), 7), train_lengths=np.array([2]))
    np.savez(tmp_path / "narrow.npz", train=np.zeros((2, 87), bool), train_lengths=np.array([2]))
    savemat(tmp_path / "other.mat", {"x": np.zeros(3)})
    savemat(tmp_path / "flat.mat", {"traindata": np.zeros((2, 88))})
    (tmp_path / "broken.mat").write_bytes(b"not matlab" * 20)
    (tmp_path / "rolls.txt").write_text("60")
    for name in ("grey.npz", "narrow.npz", "other.mat", "flat.mat", "broken.mat", "rolls.txt", "missing.npz"):
        with pytest.raises(DataError, match=name):
            read_rolls(tmp_path / name, ("train",))


def test_a_split_that_is_not_asked_for_is_not_read(tmp_path: Path) -> None:
    """Its array may be anything: a test split stays untouched."""
    buffer = io.BytesIO()
    np.savez(buffer, train=np.zeros((2, 88), bool), train_lengths=np.array([2]), test=np.array([{"an": "object"}], dtype=object))
    (tmp_path / "a.npz").write_bytes(buffer.getvalue())
    assert read_rolls(tmp_path / "a.npz", ("train",))[0].frames == 2


def test_rows_in_groups_of_16_are_joined_to_16_streams(tmp_path: Path) -> None:
    numbers = np.zeros((32, 3, 88), np.uint8)
    numbers[:, :, 0] = np.arange(32)[:, None]  # the row each frame is from
    u0 = np.zeros((32, 88), np.uint8)
    u0[:16, 1] = 1
    np.savez(tmp_path / "a.npz", train_x=numbers, train_u0=u0)
    streams = read_streams(tmp_path / "a.npz", "train")
    assert streams.lengths.tolist() == [7] * 16
    for row, stream in enumerate(streams):
        assert stream[:, 0].tolist() == [0, *[row] * 3, *[row + 16] * 3]
        assert stream[:, 1].tolist() == [1, 0, 0, 0, 0, 0, 0]
    np.savez(tmp_path / "b.npz", train_x=numbers[:15], train_u0=u0[:15])
    with pytest.raises(DataError, match="groups of 16"):
        read_streams(tmp_path / "b.npz", "train")


def test_whole_pieces_begin_with_the_frame_that_initialises(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", test_x=np.zeros((5, 88), bool), test_u0=np.ones((2, 88), bool), test_lengths=np.array([2, 3]))
    pieces = read_pieces(tmp_path / "a.npz", "test")
    assert pieces.lengths.tolist() == [3, 4]
    assert [piece[:, 0].tolist() for piece in pieces] == [[1, 0, 0], [1, 0, 0, 0]]
