"""Recordings: joined samples in an .npz archive, or any folder of sound files through libsndfile."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.data.errors import DataError
from training.data.files import fingerprint_tree
from training.data.ragged import Ragged
from training.data.readers.npz import read_arrays
from training.data.sequences import Parts, hold_out

SUFFIXES = (".wav", ".flac", ".sph", ".nist")


def read_recordings(path: Path, split: str) -> Ragged:
    """Arrays `<split>_audio` (samples joined, int16) and `<split>_lengths` (N,) as recordings (samples,) int16.

    Raises:
        DataError: not such an archive.
    """
    arrays = read_arrays(path, f"{split}_audio", f"{split}_lengths")
    samples = arrays[f"{split}_audio"]
    if samples.dtype != np.int16 or samples.ndim != 1:
        raise DataError(f"{path}: {split}_audio must be joined int16 samples, not {samples.dtype} {samples.shape}")
    return Ragged(samples, arrays[f"{split}_lengths"].astype(np.int64))


def read_sample_rate(path: Path) -> int:
    """Samples per second, from the array `sample_rate`."""
    return int(read_arrays(path, "sample_rate")["sample_rate"])


def read_audio_folder(folder: Path) -> tuple[Parts, str]:
    """Every sound file below `folder`: WAV, FLAC or NIST SPHERE (TIMIT's .WAV), channels mixed to mono, 5 % held out.

    Returns:
        The recordings (samples,) float32 in −1…1, split by file, and the hash over the relative paths and contents.

    Raises:
        DataError: no such folder, fewer than two files, one that cannot be read, or different sample rates.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise DataError(f"{folder}: no {', '.join(SUFFIXES)} files in it")
    sample_rate = _common_rate(files)
    train, valid = (Ragged.of(_read_mono(path) for path in part) for part in hold_out(files))
    return Parts(train, valid, sample_rate=sample_rate), fingerprint_tree(folder, files)


def _common_rate(files: list[Path]) -> int:
    import soundfile

    rates: dict[int, Path] = {}
    for path in files:
        try:
            rates.setdefault(int(soundfile.info(str(path)).samplerate), path)
        except (soundfile.SoundFileError, OSError) as exc:
            raise DataError(f"{path}: not a readable sound file: {exc}") from exc
    if len(rates) > 1:
        listed = ", ".join(f"{rate} Hz ({path.name})" for rate, path in sorted(rates.items()))
        raise DataError(f"the recordings differ in sample rate: {listed}; convert them to one rate first")
    return next(iter(rates))


def _read_mono(path: Path) -> NDArray[np.float32]:
    import soundfile

    try:
        samples, _ = soundfile.read(str(path), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as exc:
        raise DataError(f"{path}: not a readable sound file: {exc}") from exc
    mono: NDArray[np.float32] = samples.mean(axis=1, dtype=np.float32)
    return mono
