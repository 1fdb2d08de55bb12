"""Bytes to frames: encodings, resampling, and that no cut of the bytes changes anything."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import InvalidInput
from service.streams.audio import MULAW, AudioInput, Resampler
from tests.service.streams.conftest import sound


@pytest.mark.parametrize(("rate_in", "rate_out"), [(16_000, 8_000), (44_100, 16_000), (8_000, 16_000), (48_000, 8_000), (11_025, 8_000)])
def test_a_tone_below_both_nyquists_comes_through_unchanged(rate_in: int, rate_out: int) -> None:
    hertz = 0.3 * min(rate_in, rate_out)
    tone = np.sin(2 * np.pi * hertz * np.arange(rate_in // 4) / rate_in).astype(np.float32)
    made = Resampler(rate_in, rate_out).push(tone)
    wanted = np.sin(2 * np.pi * hertz * np.arange(len(made)) / rate_out)
    middle = slice(200, len(made) - 50)
    np.testing.assert_allclose(made[middle], wanted[middle], atol=2e-3)


def test_a_tone_above_the_lower_nyquist_is_gone() -> None:
    tone = np.sin(2 * np.pi * 6000 * np.arange(8000) / 16_000).astype(np.float32)
    assert np.abs(Resampler(16_000, 8_000).push(tone)[200:-50]).max() < 1e-3


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 5_000])
def test_draining_gives_as_many_samples_as_the_time_that_went_in(rate: int) -> None:
    resampler = Resampler(rate, 8_000) if rate != 8_000 else Resampler(8_000, 8_000)
    made = len(resampler.push(np.zeros(rate, np.float32))) + len(resampler.drain())
    assert abs(made - 8_000) <= 1


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 900), min_size=1, max_size=12),
    rate=st.sampled_from([8_000, 16_000, 22_050, 6_000]),
    encoding=st.sampled_from(["pcm_s16le", "pcm_f32le", "mulaw"]),
)
def test_frames_do_not_depend_on_how_the_bytes_were_cut(cuts: list[int], rate: int, encoding: str) -> None:
    pcm = sound(1, 3000)
    data = {"pcm_s16le": pcm.tobytes(), "pcm_f32le": (pcm / 32768).astype("<f4").tobytes(), "mulaw": pcm.astype(np.uint8).tobytes()}[
        encoding
    ]
    whole, cut = (AudioInput(rate, encoding, 8_000, 40) for _ in range(2))
    expected = [whole.push(data), *whole.flush()]
    frames, at, turn = [], 0, 0
    while at < len(data):
        size = cuts[turn % len(cuts)]
        frames.append(cut.push(data[at : at + size]))
        at, turn = at + size, turn + 1
    np.testing.assert_array_equal(np.concatenate(frames), expected[0])
    for mine, theirs in zip(cut.flush(), expected[1:], strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert cut.samples == whole.samples == len(data) // {"pcm_s16le": 2, "pcm_f32le": 4, "mulaw": 1}[encoding]


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_an_input_goes_on_from_its_state(rate: int) -> None:
    data = sound(2, 5000).tobytes()
    straight, first = (AudioInput(rate, "pcm_s16le", 8_000, 40) for _ in range(2))
    expected = straight.push(data)
    begun = first.push(data[:3333])  # in the midst of a sample
    second = AudioInput(rate, "pcm_s16le", 8_000, 40)
    second.restore({name: value.copy() for name, value in first.state().items()})
    assert second.samples == 3333 // 2
    np.testing.assert_array_equal(np.concatenate([begun, second.push(data[2 * second.samples :])]), expected)
    assert second.samples == straight.samples


def test_mulaw_is_the_table_of_the_standard() -> None:
    assert MULAW[0xFF] == 0
    assert MULAW[0x7F] == 0
    assert MULAW[0x80] == pytest.approx(32124 / 32768)
    assert MULAW[0x00] == pytest.approx(-32124 / 32768)
    assert MULAW[0xF0] == pytest.approx(120 / 32768)


def test_a_flush_completes_a_frame_with_unobserved_samples() -> None:
    audio = AudioInput(8_000, "pcm_s16le", 8_000, 40)
    assert len(audio.push(np.full(50, 3277, "<i2").tobytes())) == 1
    x, mask = audio.flush()
    assert mask[0].tolist() == [1.0] * 10 + [0.0] * 30
    np.testing.assert_allclose(x[0, :10], 3277 / 32768)
    assert len(audio.flush()[0]) == 0


@pytest.mark.parametrize(
    ("arguments", "field"),
    [((100, "pcm_s16le"), "sample_rate"), ((8_000, "mp3"), "encoding"), ((96_001, "pcm_s16le"), "sample_rate")],
)
def test_what_cannot_be_taken_is_refused_by_name(arguments: tuple[int, str], field: str) -> None:
    with pytest.raises(InvalidInput, match=field):
        AudioInput(*arguments, 8_000, 40)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1.5])
def test_floats_that_are_no_audio_are_refused_and_nothing_is_taken(bad: float) -> None:
    audio = AudioInput(8_000, "pcm_f32le", 8_000, 40)
    with pytest.raises(InvalidInput, match="finite"):
        audio.push(np.array([0.1, bad], "<f4").tobytes())
    assert audio.samples == 0
