"""What crosses between the HTTP process and the engine process: messages (a kind, then its arguments) as pickles in frames.

A frame is four bytes of length and a pickle of a list of messages. Both ends are ours, started together from the same code, and the
socket pair has no name that anybody else could open; nothing that a client sent is unpickled, only what was validated and made of it.
Arrays cross as their bytes and arrive read-only: nobody writes into what a job or a result holds.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.scheduler.job import Job, JobResult, StopReason

Message = tuple[Any, ...]
PORTION = ("first_frame", "done", "elbo", "log_likelihood", "kl", "steps_used", "shown", "state", "error")
"""What comes back of a portion, in this order."""
_LENGTH = struct.Struct("!Q")


def pack(messages: Sequence[Message]) -> bytes:
    """One frame."""
    file = io.BytesIO()
    file.write(bytes(_LENGTH.size))
    _Pickler(file, pickle.HIGHEST_PROTOCOL).dump(messages)
    frame = file.getbuffer()
    _LENGTH.pack_into(frame, 0, len(frame) - _LENGTH.size)
    return frame.tobytes()


class Unpacker:
    """Messages out of bytes that come in any pieces."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages that `data` completes, in order."""
        self._held += data
        start = 0
        while len(self._held) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._held, start)
            end = start + _LENGTH.size + length
            if len(self._held) < end:
                break
            with memoryview(self._held) as whole, whole[start + _LENGTH.size : end] as frame:
                messages = pickle.loads(frame)
            start = end
            yield from messages
        del self._held[:start]


def _array(data: bytes, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    return np.frombuffer(data, dtype).reshape(shape)


def _reduce_array(array: NDArray[Any]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return _array, (array.tobytes(), array.dtype.str, array.shape)


def _reduce_job(job: Job) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Without `on_step`, which stays where it is; a mask that is a view of a single 1 is none."""
    mask = job.mask if job.mask is None or any(job.mask.strides) else None
    return Job, (job.model, job.seeds, job.budget, job.ask, job.x, mask, job.carry, job.first_step, job.prior, job.z)


def _reduce_result(result: JobResult) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return _result, (tuple(vars(result)[name] for name in _RESULT), [reason.value for reason in result.stop_reason])


def _result(values: tuple[Any, ...], reasons: list[str]) -> JobResult:
    return JobResult(**dict(zip(_RESULT, values, strict=True)), stop_reason=[_REASONS[reason] for reason in reasons])


_RESULT = tuple(name for name in JobResult.__dataclass_fields__ if name != "stop_reason")
_REASONS = {reason.value: reason for reason in StopReason}


class _Pickler(pickle.Pickler):
    dispatch_table = {np.ndarray: _reduce_array, Job: _reduce_job, JobResult: _reduce_result}  # noqa: RUF012 (pickle reads it)
