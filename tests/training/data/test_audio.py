"""Sound files of several formats as frames of PCM."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from training.data import DataError, load_sequences
from training.data.ragged import Ragged
from training.data.sequences import cut_frames, hold_out

DIGITS = Path(__file__).resolve().parents[2] / "data/digits"


def test_a_folder_of_recordings_is_a_data_set() -> None:
    speech = load_sequences(f"audio:{DIGITS}")
    assert (speech.kind, speech.sample_rate, speech.frame_size, speech.size) == ("audio", 8_000, 200, 200)
    assert sorted([*speech.train.lengths, *speech.valid.lengths]) == [14, 15, 17]  # 2849, 3034 and 3435 samples
    assert len(speech.valid) == 1
    assert speech.train.joined.dtype == np.float32
    assert speech.mean == pytest.approx(speech.train.joined.mean(dtype=np.float64))
    assert speech.std == pytest.approx(speech.train.joined.std(dtype=np.float64))


def test_samples_are_the_16_bit_integers_over_32768(tmp_path: Path) -> None:
    speech = load_sequences(f"audio:{DIGITS}", frame_size=1)
    files = sorted(DIGITS.glob("*.wav"))
    integers = [soundfile.read(path, dtype="int16")[0] for path in files]
    found = [*speech.train, *speech.valid]
    for samples in integers:
        assert any(len(part) == len(samples) and np.array_equal(part[:, 0] * 32768, samples) for part in found)


@pytest.mark.parametrize(("suffix", "form"), [("flac", "FLAC"), ("WAV", "NIST"), ("sph", "NIST"), ("wav", "WAVEX")])
def test_other_formats_give_the_same_frames(tmp_path: Path, suffix: str, form: str) -> None:
    """TIMIT comes as NIST SPHERE files that are named .WAV."""
    for path in DIGITS.glob("*.wav"):
        samples, rate = soundfile.read(path, dtype="int16")
        target = tmp_path / "deeper" / f"{path.stem}.{suffix}"
        target.parent.mkdir(exist_ok=True)
        soundfile.write(target, samples, rate, format=form, subtype="PCM_16")
    copied, original = load_sequences(f"audio:{tmp_path}"), load_sequences(f"audio:{DIGITS}")
    np.testing.assert_array_equal(copied.train.joined, original.train.joined)
    np.testing.assert_array_equal(copied.valid.joined, original.valid.joined)
    assert copied.sha256 != original.sha256


def test_channels_are_mixed_to_their_mean(tmp_path: Path) -> None:
    left = np.linspace(-0.5, 0.5, 400)
    for name in ("a.wav", "b.wav"):
        soundfile.write(tmp_path / name, np.stack([left, 0 * left], 1), 8_000, subtype="FLOAT")
    speech = load_sequences(f"audio:{tmp_path}")
    np.testing.assert_allclose(speech.train.joined.reshape(-1), left / 2, atol=1e-7)


def test_the_rest_after_the_last_whole_frame_is_dropped() -> None:
    frames = cut_frames(Ragged.of([np.arange(7, dtype=np.int16), np.arange(2, dtype=np.int16)]), 3)
    assert frames.lengths.tolist() == [2]  # the second recording fills no frame
    np.testing.assert_array_equal(frames.joined * 32768, [[0, 1, 2], [3, 4, 5]])
    for size, reason in ((8, "no sequence has a frame"), (0, "at least 1")):
        with pytest.raises(DataError, match=reason):
            cut_frames(Ragged.of([np.arange(7, dtype=np.int16)]), size)


def test_a_twentieth_is_held_out_by_the_published_count() -> None:
    train, valid = hold_out(range(4_620))
    assert (len(train), len(valid)) == (4_389, 231)  # TIMIT
    assert sorted(train + valid) == list(range(4_620))
    assert hold_out(range(4_620)) == (train, valid)
    with pytest.raises(DataError, match="too few"):
        hold_out([1])


def test_recordings_of_two_rates_are_refused_with_their_names(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, 500)
    soundfile.write(tmp_path / "a.wav", noise, 8_000)
    soundfile.write(tmp_path / "b.wav", noise, 16_000)
    with pytest.raises(DataError, match=r"8000 Hz \(a\.wav\), 16000 Hz \(b\.wav\)"):
        load_sequences(f"audio:{tmp_path}")


def test_what_is_no_recording_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load_sequences(f"audio:{tmp_path / 'missing'}")
    with pytest.raises(DataError, match=r"no \.wav, \.flac"):
        load_sequences(f"audio:{tmp_path}")
    (tmp_path / "a.wav").write_bytes(b"RIFFnothing")
    with pytest.raises(DataError, match=r"a\.wav: not a readable sound file"):
        load_sequences(f"audio:{tmp_path}")


@pytest.mark.parametrize(("suffix", "form"), [("wav", "WAV"), ("wav", "WAVEX"), ("sph", "NIST"), ("flac", "FLAC")])
def test_a_recording_cut_short_is_refused_by_its_name(suffix: str, form: str, tmp_path: Path) -> None:
    """libsndfile gives what there is of a file, as if no more had been promised."""
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, 5_000)
    for name in ("a", "b"):
        soundfile.write(tmp_path / f"{name}.{suffix}", noise, 8_000, format=form, subtype="PCM_16")
    load_sequences(f"audio:{tmp_path}")
    path = tmp_path / f"b.{suffix}"
    path.write_bytes(path.read_bytes()[:-2_000])
    with pytest.raises(DataError, match=rf"b\.{suffix}: (cut short: the header promises|not a readable)"):
        load_sequences(f"audio:{tmp_path}")


def test_a_recording_written_as_a_stream_promises_no_end(tmp_path: Path) -> None:
    for name in ("a.wav", "b.wav"):
        soundfile.write(tmp_path / name, np.random.default_rng(0).uniform(-0.1, 0.1, 500), 8_000, subtype="PCM_16")
    whole = (tmp_path / "b.wav").read_bytes()
    (tmp_path / "b.wav").write_bytes(whole.replace(b"data" + (1_000).to_bytes(4, "little"), b"data\xff\xff\xff\xff"))
    assert load_sequences(f"audio:{tmp_path}").valid.frames == 2


def test_recordings_shorter_than_a_frame_are_counted(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, 500)
    for i, length in enumerate((500, 0, 199, 500, 200, 450)):
        soundfile.write(tmp_path / f"{i}.wav", noise[:length], 8_000)
    assert load_sequences(f"audio:{tmp_path}").left_out == "2 of 6 recordings are shorter than a frame of 200 samples, and left out"
    assert load_sequences(f"audio:{DIGITS}").left_out == ""
    with pytest.raises(DataError, match=r"no sequence has a frame: a frame is 501 samples, and the longest of \d recordings .* has 500"):
        load_sequences(f"audio:{tmp_path}", frame_size=501)


def test_samples_that_are_not_finite_are_refused_by_the_file(tmp_path: Path) -> None:
    for name, value in (("a.wav", 0.1), ("b.wav", np.nan)):
        soundfile.write(tmp_path / name, np.array([0.0, value] * 300), 8_000, subtype="FLOAT")
    with pytest.raises(DataError, match=r"b\.wav: holds samples that are not finite"):
        load_sequences(f"audio:{tmp_path}")


def test_silence_is_refused_for_it_has_no_scale(tmp_path: Path) -> None:
    for name in ("a.wav", "b.wav"):
        soundfile.write(tmp_path / name, np.zeros(500), 8_000)
    with pytest.raises(DataError, match="every training value is the same"):
        load_sequences(f"audio:{tmp_path}")
