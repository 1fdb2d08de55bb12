"""NumPy zip archives of plain arrays. Pickled objects are never loaded, and only the arrays asked for are read."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

from training.data.errors import DataError, reason
from training.data.images import Split


def read_npz_split(path: Path, images: str, labels: str | None = None) -> Split:
    """Rows from the array `images` (N, ...) and, if the archive holds it, the array `labels` (N,).

    Raises:
        DataError: not an .npz file, damaged, or without `images`.
    """
    arrays = read_arrays(path, images, optional=[labels] if labels else [])
    return Split(_as_rows(arrays[images], path, images), arrays.get(labels) if labels else None)


def image_shape(path: Path, images: str) -> tuple[int, int]:
    """(height, width) of the images in an archive: from the array (N, height, width), or a square for rows (N, X)."""
    shape = read_arrays(path, images)[images].shape
    if len(shape) == 3:
        return int(shape[1]), int(shape[2])
    side = math.isqrt(shape[1])
    return (side, side) if side * side == shape[1] else (1, int(shape[1]))


def read_arrays(path: Path, *required: str, optional: Iterable[str] = ()) -> dict[str, NDArray[Any]]:
    """The named arrays, those of `optional` where they are there; no other array is decompressed.

    Raises:
        DataError: not an .npz file, damaged, or without one of `required`.
    """
    try:
        # numpy leaves a file that it opened itself open when it turns out not to be a zip archive
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, NpzFile):
                raise DataError(f"{path}: a single array, not an .npz archive")
            for name in required:
                if name not in archive:
                    raise DataError(f"{path}: no array {name!r}, only {', '.join(archive.files) or 'nothing'}")
            return {name: archive[name] for name in (*required, *optional) if name in archive}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as exc:
        raise DataError(f"{path}: not a readable .npz archive of plain arrays: {reason(exc)}") from exc


def _as_rows(array: NDArray[Any], path: Path, name: str) -> NDArray[np.uint8]:
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise DataError(f"{path}: {name} must be uint8 of shape (N, X) or (N, height, width), not {array.dtype} {array.shape}")
    return array.reshape(len(array), -1)
