"""MIDI files on a grid of beats."""

from __future__ import annotations

from pathlib import Path

import mido
import numpy as np
import pytest

from training.data import DataError, load_sequences
from training.data.readers.midi import read_midi

Note = tuple[int, int, int]  # first tick, tick after the last, MIDI note


def write(path: Path, *tracks: list[Note], ticks: int = 480, channel: int = 0, ended_by: str = "note_off") -> Path:
    song = mido.MidiFile(ticks_per_beat=ticks)
    for notes in tracks:
        events = sorted([(on, 1, note) for on, _, note in notes] + [(off, 0, note) for _, off, note in notes])
        track, now = mido.MidiTrack(), 0
        track.append(mido.MetaMessage("set_tempo", tempo=300_000))
        for tick, sounds, note in events:
            kind = "note_on" if sounds else ended_by
            track.append(mido.Message(kind, note=note, velocity=64 if sounds else 0, channel=channel, time=tick - now))
            now = tick
        song.tracks.append(track)
    path.parent.mkdir(parents=True, exist_ok=True)
    song.save(path)
    return path


def notes(roll: np.ndarray) -> list[list[int]]:
    return [(np.flatnonzero(frame) + 21).tolist() for frame in roll]


@pytest.mark.parametrize("ended_by", ["note_off", "note_on"])
def test_a_frame_holds_the_notes_that_sound_on_its_beat(tmp_path: Path, ended_by: str) -> None:
    path = write(tmp_path / "a.mid", [(0, 960, 60), (480, 960, 64)], [(960, 1200, 67)], ended_by=ended_by)
    assert notes(read_midi(path, 1)) == [[60], [60, 64], [67]]
    assert notes(read_midi(path, 2)) == [[60], [60], [60, 64], [60, 64], [67]]


def test_played_times_are_moved_to_the_nearest_line_of_the_grid(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mid", [(0, 470, 60), (490, 970, 62), (955, 1400, 64)])
    assert notes(read_midi(path, 1)) == [[60], [62], [64]]


def test_a_note_shorter_than_a_step_still_sounds_for_one(tmp_path: Path) -> None:
    assert notes(read_midi(write(tmp_path / "a.mid", [(0, 480, 60), (485, 500, 72)]), 1)) == [[60], [72]]


def test_a_note_struck_again_goes_on_and_rests_are_empty_frames(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mid", [(0, 480, 60), (480, 960, 60), (1440, 1920, 60)])
    assert notes(read_midi(path, 1)) == [[60], [60], [], [60]]


def test_silence_before_the_first_note_drums_and_extreme_notes_are_left_out(tmp_path: Path) -> None:
    assert notes(read_midi(write(tmp_path / "a.mid", [(4800, 5280, 60), (0, 480, 20), (0, 480, 109)]), 1)) == [[60]]
    with pytest.raises(DataError, match="no notes"):
        read_midi(write(tmp_path / "drums.mid", [(0, 480, 60)], channel=9), 1)


def test_a_note_that_is_never_ended_lasts_to_the_end_of_its_track(tmp_path: Path) -> None:
    song = mido.MidiFile(ticks_per_beat=480)
    song.tracks.append(mido.MidiTrack([mido.Message("note_on", note=60), mido.MetaMessage("end_of_track", time=960)]))
    song.save(tmp_path / "a.mid")
    assert notes(read_midi(tmp_path / "a.mid", 1)) == [[60], [60]]


def test_a_folder_of_midi_files_is_a_data_set(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / "songs" / f"{number}.mid", [(0, 480 * (number + 1), 60 + number)])
    music = load_sequences(f"midi:{tmp_path}", steps_per_beat=1)
    assert (music.kind, music.size, len(music.train), len(music.valid)) == ("binary", 88, 2, 1)
    assert sorted([*music.train.lengths, *music.valid.lengths]) == [1, 2, 3]
    assert "1 frames per quarter note" in music.description


def test_what_is_no_music_on_a_grid_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load_sequences(f"midi:{tmp_path / 'missing'}")
    with pytest.raises(DataError, match=r"no \.mid"):
        load_sequences(f"midi:{tmp_path}")
    path = write(tmp_path / "a.mid", [(0, 480, 60)])
    for content, reason in (
        (b"nothing", "not a readable MIDI file"),
        (b"", "not a readable MIDI file: EOFError"),
        (path.read_bytes()[:-8], "not a readable MIDI file"),
        (path.read_bytes().replace(b"\x01\xe0", b"\xe8\x28", 1), "SMPTE"),
    ):
        (tmp_path / "b.mid").write_bytes(content)
        with pytest.raises(DataError, match=reason):
            read_midi(tmp_path / "b.mid", 1)
    with pytest.raises(DataError, match="more than 100,000"):
        read_midi(write(tmp_path / "long.mid", [(0, 200_000, 60)], ticks=1), 1)
    with pytest.raises(DataError, match="at least 1"):
        read_midi(path, 0)
