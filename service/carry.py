"""What a model keeps between steps beyond λ, as one string that a client can hand back.

    base64url( b"ELB1" · first 16 bytes of the artifact's sha256 · per array: name, dtype, shape, little-endian data )

Names and texts are length-prefixed by one byte, sizes are 32-bit. The card decides which arrays there are and how long: the
string is checked against it byte by byte, and a string made by other weights is refused. Nothing is unpickled.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.artifact import Arrays, TensorSpec

MAGIC = b"ELB1"
_BOUND = 16


class CarryError(ValueError):
    """The string is not a carry of this model; the message says why."""


def pack(arrays: Mapping[str, NDArray[Any]], artifact_sha256: str) -> str:
    """`arrays` (of one row, without the row axis) as a string bound to the artifact."""
    parts = [MAGIC, bytes.fromhex(artifact_sha256)[:_BOUND]]
    for name, array in arrays.items():
        parts += [_header(name, array.dtype.name, array.shape), np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()]
    return base64.urlsafe_b64encode(b"".join(parts)).decode()


def unpack(text: str, specs: Sequence[TensorSpec], artifact_sha256: str) -> Arrays:
    """The arrays of one row, as `specs` (row axis first) names them.

    Raises:
        CarryError: made by another artifact, of other arrays or lengths, not finite, or not such a string at all.
    """
    expected = [(spec, tuple(int(size) for size in spec.shape[1:])) for spec in specs]
    headers = [_header(spec.name, spec.dtype, shape) for spec, shape in expected]
    sizes = [int(np.prod(shape)) * np.dtype(spec.dtype).itemsize for spec, shape in expected]
    total = len(MAGIC) + _BOUND + sum(map(len, headers)) + sum(sizes)
    if len(text) != 4 * -(-total // 3):
        raise CarryError(f"has {len(text)} characters, a carry of this model has {4 * -(-total // 3)}")
    try:
        raw = base64.b64decode(text, altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as exc:
        raise CarryError("is not base64url") from exc
    if raw[: len(MAGIC)] != MAGIC or len(raw) != total:
        raise CarryError("is not a carry: hand it back exactly as a reply gave it")
    if raw[len(MAGIC) : len(MAGIC) + _BOUND] != bytes.fromhex(artifact_sha256)[:_BOUND]:
        raise CarryError("was made by another model or version")
    arrays, offset = {}, len(MAGIC) + _BOUND
    for (spec, shape), header, size in zip(expected, headers, sizes, strict=True):
        if raw[offset : offset + len(header)] != header:
            raise CarryError(f"does not hold {spec.name!r} of shape {list(shape)} where this model keeps it")
        offset += len(header)
        array = np.frombuffer(raw, np.dtype(spec.dtype).newbyteorder("<"), count=int(np.prod(shape)), offset=offset)
        if not np.isfinite(array).all():
            raise CarryError(f"{spec.name!r} is not finite")
        arrays[spec.name] = array.reshape(shape).astype(spec.dtype)
        offset += size
    return arrays


def _header(name: str, dtype: str, shape: Sequence[int]) -> bytes:
    texts = b"".join(struct.pack("<B", len(text.encode())) + text.encode() for text in (name, dtype))
    return texts + struct.pack(f"<B{len(shape)}I", len(shape), *shape)
