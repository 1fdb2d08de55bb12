"""What crosses between the HTTP process and the engine process: messages (a kind, then its arguments) as pickles in frames.

A frame is a pickle of a list of messages, after its length and those of the large arrays, which follow it as they are. Both ends are
ours, started together from the same code, and the socket pair has no name that anybody else could open; nothing that a client sent is
unpickled, only what was validated and made of it. Arrays arrive read-only: nobody writes into what a job or a result holds.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.scheduler.job import Job, JobResult, StopReason

Message = tuple[Any, ...]
PORTION = ("first_frame", "done", "elbo", "log_likelihood", "kl", "steps_used", "shown", "state", "error")
"""What comes back of a portion, in this order."""
_HEAD, _SIZE = struct.Struct("!QI"), struct.Struct("!Q")
ASIDE_BYTES = 2**16
"""Arrays larger than this are not copied into the pickle, but follow it."""
Part = bytes | memoryview


def pack(messages: Sequence[Message]) -> list[Part]:
    """One frame, in the parts in which it leaves. Until then nobody may write into the arrays."""
    file, aside = io.BytesIO(), list[pickle.PickleBuffer]()
    _Pickler(file, pickle.HIGHEST_PROTOCOL, buffer_callback=aside.append).dump(messages)
    pickled, arrays = file.getvalue(), [buffer.raw() for buffer in aside]
    return [_HEAD.pack(len(pickled), len(arrays)) + b"".join(_SIZE.pack(len(array)) for array in arrays) + pickled, *arrays]


class Unpacker:
    """Messages out of bytes that come in any pieces."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages that `data` completes, in order."""
        self._held += data
        start = 0
        while (ends := self._ends(start)) is not None and ends[-1] <= len(self._held):
            aside = memoryview(bytes(self._held[ends[1] : ends[-1]]))
            arrays = [aside[begin - ends[1] : end - ends[1]] for begin, end in pairwise(ends[1:])]
            with memoryview(self._held) as whole, whole[ends[0] : ends[1]] as pickled:
                messages = pickle.loads(pickled, buffers=arrays)
            start = ends[-1]
            yield from messages
        del self._held[:start]

    def _ends(self, start: int) -> list[int] | None:
        """Where head, pickle and each array of the frame at `start` end; None while that cannot be told."""
        if len(self._held) - start < _HEAD.size:
            return None
        length, count = _HEAD.unpack_from(self._held, start)
        head = start + _HEAD.size + count * _SIZE.size
        if len(self._held) < head:
            return None
        sizes = [_SIZE.unpack_from(self._held, start + _HEAD.size + i * _SIZE.size)[0] for i in range(count)]
        return list(accumulate([head, length, *sizes]))


def _array(data: bytes | memoryview, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    return np.frombuffer(data, dtype).reshape(shape)


def _reduce_array(array: NDArray[Any]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    if array.nbytes > ASIDE_BYTES:
        return _array, (pickle.PickleBuffer(np.ascontiguousarray(array).data), array.dtype.str, array.shape)
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
