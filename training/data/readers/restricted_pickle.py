"""Pickles of plain data, read without giving them any power.

A pickle is a program; the unpickler here knows only the instructions that build lists, tuples, dicts, numbers and
strings, and NumPy's integer scalars (which Python 2 pickles of the JSB chorales hold). Even those are rebuilt by the two
classes below, never by NumPy's own constructors. Every other name a pickle asks for is refused before anything is called.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, ClassVar

from training.data.errors import DataError, reason

# what the instructions of a damaged pickle can fail with
DAMAGE = (pickle.UnpicklingError, OSError, EOFError, ValueError, TypeError, AttributeError, LookupError, MemoryError, OverflowError)


def read_plain_pickle(path: Path) -> Any:
    """Nested lists, tuples, dicts, numbers and strings; NumPy integers come back as int. Strings of Python 2 are latin-1.

    Raises:
        DataError: not a readable pickle, or one that wants more than plain data.
    """
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file, encoding="latin1").load()
    except DataError as exc:
        raise DataError(f"{path}: {exc}") from exc
    except DAMAGE as exc:
        raise DataError(f"{path}: not a readable pickle: {reason(exc)}") from exc


class _IntegerType:
    """Stands for numpy.dtype('i8') and the like: the width, signedness and byte order of an integer."""

    CODES = frozenset(f"{sign}{size}" for sign in "iu" for size in (1, 2, 4, 8))

    def __init__(self, code: object, *_: object):
        if code not in self.CODES:
            raise DataError(f"refused: NumPy type {code!r} is no plain integer")
        self.code = str(code)
        self.byteorder = "<"

    def __setstate__(self, state: tuple[object, ...]) -> None:
        """What NumPy stores beside the code: (version, byte order, …)."""
        if state[1] not in ("<", ">", "|"):
            raise DataError(f"refused: byte order {state[1]!r}")
        self.byteorder = str(state[1])


class _IntegerScalar:
    """Stands for numpy.core.multiarray.scalar(type, bytes); gives a Python int."""

    def __new__(cls, kind: object, raw: object) -> int:  # type: ignore[misc]
        content = raw.encode("latin1") if isinstance(raw, str) else raw
        if not isinstance(kind, _IntegerType) or not isinstance(content, bytes) or len(content) != int(kind.code[1:]):
            raise DataError("refused: a NumPy scalar that is no integer")
        return int.from_bytes(content, "big" if kind.byteorder == ">" else "little", signed=kind.code[0] == "i")

    def __setstate__(self, state: object) -> None:
        """Here so that a pickle cannot set attributes of the class itself."""


class _PlainUnpickler(pickle.Unpickler):
    KNOWN: ClassVar[dict[tuple[str, str], type]] = {
        ("numpy", "dtype"): _IntegerType,
        ("numpy.core.multiarray", "scalar"): _IntegerScalar,
        ("numpy._core.multiarray", "scalar"): _IntegerScalar,  # as NumPy 2 writes it
    }

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a permitted name.

        Raises:
            DataError: any other name.
        """
        try:
            return self.KNOWN[module, name]
        except KeyError:
            raise DataError(f"refused: the pickle asks for {module}.{name}, but only plain lists of numbers are read") from None
