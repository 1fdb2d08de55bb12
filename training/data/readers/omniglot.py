"""Omniglot's original archive: one-bit 105 x 105 PNG files, reduced here to 28 x 28 grey.

Each of the 28 x 28 cells covers 3.75 x 3.75 of the original pixels; its value is the share of ink in it, times 255.
The usual benchmark (`chardata.mat` of the IWAE paper) was made by a different resize and a different split, so
likelihoods on these images are not comparable with published ones.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.data.errors import DataError, reason
from training.data.images import Bytes, Split


def read_omniglot_zip(path: Path, side: int = 28) -> Split:
    """Every drawing in the archive, (N, side · side), sorted by alphabet, character and file name.

    Raises:
        DataError: not a zip archive, or no drawings in it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(name for name in archive.namelist() if name.endswith(".png"))
            if not names:
                raise DataError(f"{path}: no .png files in it")
            images = np.stack([average_cells(_ink(archive.read(name)), side).reshape(-1) for name in names])
    except (OSError, zipfile.BadZipFile, SyntaxError, ValueError) as exc:
        raise DataError(f"{path}: not a readable archive of drawings: {reason(exc)}") from exc
    return Split(images)


def average_cells(ink: NDArray[np.bool_], side: int) -> Bytes:
    """The exact share of ink in each of side x side equal cells of a square mask, times 255, rounded to uint8."""
    overlap = _overlap(ink.shape[0], side)
    return np.rint(255 * (overlap @ ink @ overlap.T)).astype(np.uint8)


def _overlap(pixels: int, cells: int) -> NDArray[np.float64]:
    """(cells, pixels): the share of each cell that each pixel covers; rows sum to 1."""
    edges = np.arange(cells + 1) * (pixels / cells)
    start, stop = edges[:-1, None], edges[1:, None]
    pixel = np.arange(pixels)[None, :]
    return np.clip(np.minimum(stop, pixel + 1) - np.maximum(start, pixel), 0, None) * (cells / pixels)


def _ink(png: bytes) -> NDArray[np.bool_]:
    with Image.open(io.BytesIO(png)) as image:
        return ~np.asarray(image.convert("1"), dtype=np.bool_)  # black strokes on white paper
