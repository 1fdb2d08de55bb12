"""MIDI files as piano rolls on a grid of beats, as the published sets were sampled (a time step is a musical duration).

An onset and an end are moved to the nearest line of the grid, and every note sounds for at least one step. Frames before
the first onset are left out. Drums (channel 10), notes outside 21 to 108 and the sustain pedal are ignored; pieces are not
transposed (the published sets were, to C major or C minor).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import mido
import numpy as np

from training.data.errors import DataError, reason
from training.data.files import fingerprint_tree
from training.data.ragged import Ragged
from training.data.readers.piano_roll import LOWEST_NOTE, NOTES, Roll
from training.data.sequences import Parts, hold_out

SUFFIXES = (".mid", ".midi")
DRUMS = 9  # channels count from 0 in the file
LONGEST = 100_000  # steps; a damaged delta time can say hundreds of millions


def read_midi_folder(folder: Path, steps_per_beat: int) -> tuple[Parts, str]:
    """Every MIDI file below `folder`, 5 % of them held out.

    Args:
        steps_per_beat: frames per quarter note: 2 is the eighth-note grid of the published sets, 1 that of JSB.

    Returns:
        The rolls (T, 88) uint8, split by file, and the hash over the relative paths and contents.

    Raises:
        DataError: no such folder, fewer than two files, or one that cannot be read.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise DataError(f"{folder}: no {', '.join(SUFFIXES)} files in it")
    train, valid = (Ragged.of(read_midi(path, steps_per_beat) for path in part) for part in hold_out(files))
    return Parts(train, valid), fingerprint_tree(folder, files)


def read_midi(path: Path, steps_per_beat: int) -> Roll:
    """(T, 88): the notes of all tracks.

    Raises:
        DataError: not a MIDI file, timed in seconds instead of beats, too long, or without a note.
    """
    if steps_per_beat < 1:
        raise DataError(f"steps_per_beat must be at least 1, not {steps_per_beat}")
    try:
        song = mido.MidiFile(path)
    except (OSError, EOFError, ValueError, LookupError, mido.KeySignatureError) as exc:
        raise DataError(f"{path}: not a readable MIDI file: {reason(exc)}") from exc
    if song.ticks_per_beat <= 0:
        raise DataError(f"{path}: timed in seconds (SMPTE), so it has no beats to sample at")
    ticks = song.ticks_per_beat / steps_per_beat
    notes = [(_nearest(on / ticks), _nearest(off / ticks), note) for track in song.tracks for on, off, note in _notes(track)]
    if not notes:
        raise DataError(f"{path}: no notes in it")
    first = min(on for on, _, _ in notes)
    steps = max(max(off, on + 1) for on, off, _ in notes) - first
    if steps > LONGEST:
        raise DataError(f"{path}: {steps:,} steps, more than {LONGEST:,}")
    roll = np.zeros((steps, NOTES), np.uint8)
    for on, off, note in notes:
        roll[on - first : max(off, on + 1) - first, note - LOWEST_NOTE] = 1
    return roll


def _notes(track: mido.MidiTrack) -> Iterator[tuple[int, int, int]]:
    """(first tick, tick after the last, MIDI note) of the pitched notes of a track; one never ended lasts to the track's end."""
    tick = 0
    sounding: dict[tuple[int, int], list[int]] = {}
    for message in track:
        tick += message.time
        if message.type not in ("note_on", "note_off") or message.channel == DRUMS:
            continue
        if not LOWEST_NOTE <= message.note < LOWEST_NOTE + NOTES:
            continue
        starts = sounding.setdefault((message.channel, message.note), [])
        if message.type == "note_on" and message.velocity > 0:
            starts.append(tick)
        elif starts:
            yield starts.pop(0), tick, message.note
    for (_, note), starts in sounding.items():
        yield from ((start, tick, note) for start in starts)


def _nearest(position: float) -> int:
    """The nearest line of the grid, the later one in the middle (Python's own rounding goes to the even one)."""
    return math.floor(position + 0.5)
