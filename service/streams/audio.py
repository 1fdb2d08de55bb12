"""Audio bytes in, model frames out: decoding, resampling, framing. All of it is state that a token can carry.

    bytes ─► samples in −1…1 ─► resampler (if the rates differ) ─► frames of the model's size

Results do not depend on how the bytes were cut into messages: every resampled value is one dot product over one window of
samples, whatever the message it came in.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import InvalidInput

Samples = NDArray[np.float32]

ENCODINGS = {"pcm_s16le": 2, "pcm_f32le": 4, "mulaw": 1}
"""Name -> bytes per sample."""
RATES = (4_000, 192_000)
MAX_TAPS = 400_000
ZERO_CROSSINGS = 16
"""Of the windowed sinc, on either side of its centre, at the lower of the two rates."""
OUTPUTS_AT_ONCE = 2048
"""Of the resampler: each takes a window and its taps, some hundred numbers, from memory."""
MOST_PRODUCTS = 1_000_000
"""Of resampling, in the event loop: some ten milliseconds."""
KAISER_BETA = 9.0
"""About 90 dB of attenuation in the stop band."""


def _mulaw_table() -> Samples:
    """G.711 µ-law, byte -> sample in −1…1."""
    code = ~np.arange(256, dtype=np.uint8)
    exponent, mantissa = (code >> 4) & 7, code & 15
    magnitude = ((mantissa.astype(np.int32) * 2 + 33) << exponent) - 33
    return (np.where(code & 128, -magnitude, magnitude) * 4 / 32768).astype(np.float32)


MULAW = _mulaw_table()


def decode(data: bytes, encoding: str) -> Samples:
    """Whole samples of `encoding` as float32.

    Raises:
        InvalidInput: a float is not finite, or far outside −1…1.
    """
    if encoding == "pcm_s16le":
        return np.frombuffer(data, "<i2").astype(np.float32) * np.float32(1 / 32768)
    if encoding == "mulaw":
        return MULAW[np.frombuffer(data, np.uint8)]
    samples = np.frombuffer(data, "<f4").astype(np.float32)
    if len(samples) and not np.abs(samples).max() <= 1.0:
        raise InvalidInput.at("audio", "pcm_f32le samples must be finite and lie in −1…1")
    return samples


class Resampler:
    """Rational polyphase FIR resampling, output rate / input rate = up / down, with zero delay.

    Output j stands at input time j · down / up and is the sum over the taps of one phase of the filter. The first samples are
    preceded by silence. The tail of input that later outputs need is kept between calls.

    Raises:
        InvalidInput: the ratio needs a filter of absurd length.
    """

    def __init__(self, rate_in: int, rate_out: int):
        divisor = gcd(rate_in, rate_out)
        self.up, self.down = rate_out // divisor, rate_in // divisor
        self.phases = _phases(self.up, self.down)
        self.half = self.phases.shape[1] // 2
        self.tail: Samples = np.zeros(self.half - 1, np.float32)
        """Input samples from `self.first` on."""
        self.first = -(self.half - 1)
        self.made = 0
        """Outputs so far."""

    def push(self, samples: Samples) -> Samples:
        """All outputs whose window is complete."""
        self.tail = np.concatenate([self.tail, samples])
        return self._make(self.first + len(self.tail))

    def drain(self) -> Samples:
        """The outputs that stand within the samples seen; silence follows."""
        seen = self.first + len(self.tail)
        wanted = -(-seen * self.up // self.down) - self.made
        self.tail = np.concatenate([self.tail, np.zeros(self.half + 1, np.float32)])
        made = self._make(self.first + len(self.tail))[: max(0, wanted)]
        return made

    def _make(self, end: int) -> Samples:
        # output j needs inputs floor(j · down / up) − half + 1 … + half
        count = max(0, ((end - self.half) * self.up + self.up - 1) // self.down + 1 - self.made)
        j = np.arange(self.made, self.made + count, dtype=np.int64)
        centre, phase = np.divmod(j * self.down, self.up)
        keep = centre + self.half < end
        centre, phase = centre[keep], phase[keep]
        start = centre - self.half + 1 - self.first
        made = np.empty(len(start), np.float32)
        windows = np.lib.stride_tricks.sliding_window_view(self.tail, 2 * self.half) if len(start) else np.empty((0, 2 * self.half))
        for i in range(0, len(start), OUTPUTS_AT_ONCE):
            part = slice(i, i + OUTPUTS_AT_ONCE)
            # einsum without BLAS: a row's sum does not depend on how many rows there are
            made[part] = np.einsum("jk,jk->j", windows[start[part]], self.phases[phase[part]], optimize=False)
        self.made += len(made)
        drop = self.made * self.down // self.up - self.half + 1 - self.first
        if drop > 0:
            drop = min(drop, len(self.tail))
            self.tail, self.first = self.tail[drop:].copy(), self.first + drop
        return made


@lru_cache(maxsize=64)
def _phases(up: int, down: int) -> NDArray[np.float64]:
    """(up, 2 · half): the windowed sinc at the inputs around an output, for each of the `up` places between two inputs."""
    cut = min(1.0, up / down)
    half = int(np.ceil(ZERO_CROSSINGS / cut))
    if up * 2 * half > MAX_TAPS:
        needed = up * 2 * half
        raise InvalidInput.at(
            "sample_rate", f"resampling by {up}/{down} needs {needed} filter taps, {MAX_TAPS} are taken: choose another rate"
        )
    offset = np.arange(-half + 1, half + 1) - np.arange(up)[:, None] / up
    window = np.i0(KAISER_BETA * np.sqrt(np.maximum(0, 1 - (offset / half) ** 2))) / np.i0(KAISER_BETA)
    taps = cut * np.sinc(cut * offset) * window
    return np.asarray(taps / taps.sum(1, keepdims=True))


class AudioInput:
    """The bytes of one stream as frames of its model.

    Args:
        sample_rate: of the bytes. encoding: a key of ENCODINGS. model_rate, frame_size: what the model takes.

    Raises:
        InvalidInput: the rate or encoding cannot be taken.
    """

    def __init__(self, sample_rate: int, encoding: str, model_rate: int, frame_size: int):
        if encoding not in ENCODINGS:
            raise InvalidInput.at("encoding", f"{encoding!r} is unknown: one of {', '.join(ENCODINGS)}")
        if not RATES[0] <= sample_rate <= RATES[1]:
            raise InvalidInput.at("sample_rate", f"must lie between {RATES[0]} and {RATES[1]} Hz, not {sample_rate}")
        self.encoding, self.frame_size = encoding, frame_size
        self.samples = 0
        """Whole input samples taken."""
        self._width = ENCODINGS[encoding]
        self._resampler = None if sample_rate == model_rate else Resampler(sample_rate, model_rate)
        self._odd = b""
        self._partial: Samples = np.empty(0, np.float32)

    def push(self, data: bytes) -> Samples:
        """The frames that `data` completes, (n, frame_size).

        Raises:
            InvalidInput: samples that are no audio. Nothing was taken then.
        """
        if self._odd:
            data = self._odd + data
        whole = len(data) - len(data) % self._width
        samples = decode(data[:whole] if whole < len(data) else data, self.encoding)
        self._odd = data[whole:]
        self.samples += len(samples)
        return self._framed(samples if self._resampler is None else self._resampler.push(samples))

    def is_heavy(self, size: int) -> bool:
        """Whether so many bytes are better pushed by another thread."""
        if self._resampler is None:
            return False
        return size // self._width * self._resampler.up // self._resampler.down * 2 * self._resampler.half > MOST_PRODUCTS

    def flush(self) -> tuple[Samples, Samples]:
        """The frames that are left, the last one filled up with unobserved samples: x and mask, (n, frame_size) each, n may be 0."""
        drained = self._framed(self._resampler.drain()) if self._resampler is not None else np.empty((0, self.frame_size), np.float32)
        x, mask = [drained], [np.ones_like(drained)]
        if len(self._partial):
            last = np.zeros((2, self.frame_size), np.float32)
            last[0, : len(self._partial)], last[1, : len(self._partial)] = self._partial, 1
            self._partial = self._partial[:0]
            x.append(last[:1])
            mask.append(last[1:])
        if self._resampler is not None:
            self._resampler = Resampler(self._resampler.down, self._resampler.up)
        self._odd = b""
        return np.concatenate(x), np.concatenate(mask)

    def _framed(self, samples: Samples) -> Samples:
        if len(self._partial):
            samples = np.concatenate([self._partial, samples])
        whole = len(samples) - len(samples) % self.frame_size
        self._partial = samples[whole:].copy()
        return samples[:whole].reshape(-1, self.frame_size)

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything that `restore` needs besides the constructor's arguments. Bytes of a sample that is not whole yet are not in it:
        whoever goes on sends from sample `samples` on."""
        arrays: dict[str, NDArray[Any]] = {
            "samples": np.array([self.samples], np.int64),
            "partial": self._partial.copy(),
        }
        if self._resampler is not None:
            arrays["tail"] = self._resampler.tail.copy()
            arrays["place"] = np.array([self._resampler.first, self._resampler.made], np.int64)
        return arrays

    @staticmethod
    def between_frames(arrays: Mapping[str, NDArray[Any]]) -> bool:
        """Whether this state, as `state` gave it, holds no sample that waits for its frame, and no resampler's tail."""
        return "tail" not in arrays and not arrays["partial"].size

    def restore(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Takes over what `state` of an input of the same kind gave."""
        self.samples = int(arrays["samples"][0])
        self._partial = np.asarray(arrays["partial"], np.float32)
        self._odd = b""
        if self._resampler is not None:
            self._resampler.tail = np.asarray(arrays["tail"], np.float32)
            self._resampler.first, self._resampler.made = (int(value) for value in arrays["place"])
