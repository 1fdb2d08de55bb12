"""The original MNIST format (yann.lecun.com): gzip of a big-endian header and the bytes, row by row.

offset 0   int32   0x00000801 labels, 0x00000803 images: two zero bytes, 0x08 for uint8, the number of axes
offset 4   int32   size of each axis
then       uint8   the values
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

from training.data.errors import DataError, reason
from training.data.images import Bytes, Split


def read_idx(path: Path, axes: int) -> Bytes:
    """The uint8 array in `path` (.gz or plain), which must have `axes` axes: 1 for labels, 3 for images.

    Raises:
        DataError: wrong magic number, truncated, or longer than its header says.
    """
    raw = _read_bytes(path)
    header = 4 + 4 * axes
    if len(raw) < header:
        raise DataError(f"{path}: {len(raw)} bytes are too short for an idx header of {header}: truncated")
    magic = int.from_bytes(raw[:4], "big")
    if magic != 0x0800 + axes:
        raise DataError(f"{path}: magic number {magic}, not {0x0800 + axes} (uint8 with {axes} axes): not the expected idx file")
    shape = tuple(int(size) for size in np.frombuffer(raw[4:header], ">u4"))
    expected = int(np.prod(shape, dtype=np.int64))
    if len(raw) - header != expected:
        raise DataError(f"{path}: the header promises {expected} values {shape}, {len(raw) - header} are there: truncated or altered")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy()  # a copy, for frombuffer is read-only


def read_idx_split(images: Path, labels: Path | None = None) -> Split:
    """Images (N, X) and, if given, their labels (N,)."""
    pixels = read_idx(images, axes=3)
    return Split(pixels.reshape(len(pixels), -1), None if labels is None else read_idx(labels, axes=1))


def _read_bytes(path: Path) -> bytes:
    raw = path.read_bytes()
    if path.suffix != ".gz":
        return raw
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as exc:
        raise DataError(f"{path}: not a complete gzip file: {reason(exc)}") from exc
