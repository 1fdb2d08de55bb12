"""The archives of "Sequential Neural Models with Stochastic Layers" (Fraccaro et al. 2016): another sampling of the four
piano-roll sets, cut into rows of 100 frames for training with carried state.

Rows come in groups of 16, and row r of a group continues row r of the group before it; so a split is 16 long streams, each
beginning with the first row's `u0`, the frame before the first target. Pieces follow one another inside a stream.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from training.data.errors import DataError
from training.data.ragged import Ragged
from training.data.readers.npz import read_arrays

STREAMS = 16


def read_streams(path: Path, split: str) -> Ragged:
    """The 16 streams of a split, (1 + 100 · groups, 88) uint8 each; the first frame only initialises.

    Raises:
        DataError: not such an archive.
    """
    arrays = read_arrays(path, f"{split}_x", f"{split}_u0")
    x, u0 = arrays[f"{split}_x"].astype(np.uint8), arrays[f"{split}_u0"].astype(np.uint8)
    if x.ndim != 3 or len(x) % STREAMS or u0.shape != (len(x), x.shape[2]):
        raise DataError(f"{path}: {split} must be groups of {STREAMS} rows, not {x.shape} with {u0.shape}")
    return Ragged.of(np.concatenate([u0[[row]], x[row::STREAMS].reshape(-1, x.shape[2])]) for row in range(STREAMS))


def read_pieces(path: Path, split: str) -> Ragged:
    """Whole pieces, (1 + T, 88) uint8 each: `u0`, which only initialises, then the targets.

    Raises:
        DataError: not such an archive.
    """
    arrays = read_arrays(path, f"{split}_x", f"{split}_u0", f"{split}_lengths")
    targets = Ragged(arrays[f"{split}_x"].astype(np.uint8), arrays[f"{split}_lengths"].astype(np.int64))
    first = arrays[f"{split}_u0"].astype(np.uint8)
    return Ragged.of(np.concatenate([u0[None], piece]) for u0, piece in zip(first, targets, strict=True))
