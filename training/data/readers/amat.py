"""Larochelle's text format of binarised MNIST: one image per line, its pixels as 0 or 1 with a space between."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from training.data.errors import DataError
from training.data.images import Split


def read_amat(path: Path, pixels: int = 784) -> Split:
    """Images (N, pixels) of 0 and 1.

    Read as one block of bytes, not number by number: the training file has 39 million numbers.

    Raises:
        DataError: another character than 0, 1 and white space, or lines of another length.
    """
    text = path.read_bytes()
    values = np.frombuffer(text.translate(None, b" \t\r\n"), np.uint8) - ord("0")
    if values.size == 0 or int(values.max()) > 1:
        raise DataError(f"{path}: expected lines of 0 and 1 only")
    lines = text.count(b"\n") + (not text.endswith(b"\n"))
    if values.size != lines * pixels:
        raise DataError(f"{path}: {values.size} values on {lines} lines, not {pixels} on each: truncated or altered")
    return Split(values.reshape(lines, pixels))
