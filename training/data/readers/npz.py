"""NumPy zip archives of plain arrays. Pickled objects are never loaded, and only the arrays asked for are read."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.data.errors import DataError
from training.data.images import Split


def read_npz_split(path: Path, images: str, labels: str | None = None) -> Split:
    """Rows from the array `images` (N, ...) and, if the archive holds it, the array `labels` (N,).

    Raises:
        DataError: not an .npz file, damaged, or without `images`.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{path}: a single array, not an .npz archive")
            if images not in archive:
                raise DataError(f"{path}: no array {images!r}, only {', '.join(archive.files) or 'nothing'}")
            pixels = _as_rows(archive[images], path, images)
            return Split(pixels, archive[labels] if labels is not None and labels in archive else None)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as exc:
        raise DataError(f"{path}: not a readable .npz archive of plain arrays: {exc}") from exc


def image_shape(path: Path, images: str) -> tuple[int, int]:
    """(height, width) of the images in an archive: from the array (N, height, width), or a square for rows (N, X)."""
    with np.load(path, allow_pickle=False) as archive:
        shape = archive[images].shape
    if len(shape) == 3:
        return int(shape[1]), int(shape[2])
    side = round(float(np.sqrt(shape[1])))
    return (side, side) if side * side == shape[1] else (1, int(shape[1]))


def _as_rows(array: NDArray[Any], path: Path, name: str) -> NDArray[np.uint8]:
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise DataError(f"{path}: {name} must be uint8 of shape (N, X) or (N, height, width), not {array.dtype} {array.shape}")
    return array.reshape(len(array), -1)
