"""Recordings: joined samples in an .npz archive, or any folder of sound files through libsndfile."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.data.errors import DataError, reason
from training.data.files import fingerprint_tree
from training.data.ragged import Ragged
from training.data.readers.npz import read_arrays
from training.data.sequences import Parts, hold_out

SUFFIXES = (".wav", ".flac", ".sph", ".nist")
OPEN_ENDED = 0x7FFF0000
"""Bytes that programs write as the size of a WAV whose end they do not know yet, or more."""


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
        DataError: no such folder, fewer than two files, one that cannot be read whole, or different sample rates.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise DataError(f"{folder}: no {', '.join(SUFFIXES)} files in it")
    sample_rate = _common_rate(files)
    train, valid = (Ragged.of(_read_mono(path) for path in part) for part in hold_out(files))
    empty = len(files) - len(train) - len(valid)
    return Parts(train, valid, sample_rate=sample_rate, empty=empty), fingerprint_tree(folder, files)


def _common_rate(files: list[Path]) -> int:
    import soundfile

    rates: dict[int, Path] = {}
    for path in files:
        try:
            rates.setdefault(int(soundfile.info(str(path)).samplerate), path)
        except (soundfile.SoundFileError, OSError) as exc:
            raise DataError(f"{path}: not a readable sound file: {reason(exc)}") from exc
    if len(rates) > 1:
        listed = ", ".join(f"{rate} Hz ({path.name})" for rate, path in sorted(rates.items()))
        raise DataError(f"the recordings differ in sample rate: {listed}; convert them to one rate first")
    return next(iter(rates))


def _read_mono(path: Path) -> NDArray[np.float32]:
    import soundfile

    try:
        samples, _ = soundfile.read(str(path), dtype="float32", always_2d=True)
        _refuse_cut_short(path, max(int(soundfile.info(str(path)).frames), _sphere_samples(path)), len(samples))
    except (soundfile.SoundFileError, OSError) as exc:
        raise DataError(f"{path}: not a readable sound file: {reason(exc)}") from exc
    if not np.isfinite(samples).all():
        raise DataError(f"{path}: holds samples that are not finite")
    mono: NDArray[np.float32] = samples.mean(axis=1, dtype=np.float32)
    return mono


def _refuse_cut_short(path: Path, promised: int, read: int) -> None:
    """Raises DataError if the header promises more than is there; of a file cut short libsndfile gives what it finds."""
    if read < promised:
        raise DataError(f"{path}: cut short: the header promises {promised:,} samples, {read:,} are there")
    size, there = _wave_bytes(path)
    if there < size < OPEN_ENDED:
        raise DataError(f"{path}: cut short: the header promises {size:,} bytes of sound, {there:,} are there")


def _wave_bytes(path: Path) -> tuple[int, int]:
    """Bytes of sound that a WAV file promises, and those that follow; of another file 0 and 0."""
    with path.open("rb") as file:
        head = file.read(12)
        while head[:4] == b"RIFF" and len(chunk := file.read(8)) == 8:
            size = int.from_bytes(chunk[4:], "little")
            if chunk[:4] == b"data":
                return size, path.stat().st_size - file.tell()
            file.seek(size + size % 2, 1)
    return 0, 0


def _sphere_samples(path: Path) -> int:
    """Samples per channel that a NIST SPHERE file promises; of another file 0."""
    with path.open("rb") as file:
        found = re.search(rb"^NIST_1A\n.*\nsample_count -i (\d+)", file.read(1024), re.DOTALL)
    return int(found[1]) if found else 0
