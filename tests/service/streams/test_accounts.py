"""What filtering costs a caller: what was refused, or failed, is given back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from service.errors import BackendFailure, ElbowError, Overloaded
from service.keys import KeyRing, digest_of
from service.streams.stream import Portion, Stream
from tests.service.streams.small_filter import X, small_card

BOB = {"X-API-Key": "bobs-key"}
FRAMES = [[0.0] * X] * 3
TENSOR = {"name": "x", "shape": [3, X], "datatype": "FP32", "data": [0.0] * 3 * X}


class Refusing:
    """A lane that refuses to open a stream, or fails at what it is fed."""

    draining = False

    def __init__(self, at_the_door: ElbowError | None, later: ElbowError | None):
        self._at_the_door, self._later = at_the_door, later

    def open(self, stream: Stream) -> None:
        if self._at_the_door is not None:
            raise self._at_the_door

    def feed(self, portion: Portion) -> None:
        portion.error = self._later
        portion.settle()

    def close(self, stream: Stream) -> None: ...


@pytest.mark.parametrize("parameters", [None, {}, {"sequence_id": 1, "sequence_start": True}, {"sequence_id": 1}])
@pytest.mark.parametrize("errors", [(Overloaded("full"), None), (None, BackendFailure("it broke"))])
def test_what_was_refused_or_failed_is_not_paid_for(
    serve: Callable[..., Any], errors: tuple[ElbowError | None, ElbowError | None], parameters: dict[str, Any] | None
) -> None:
    ring = KeyRing([f"bob {digest_of('bobs-key')} 0.001/10"])
    service = serve(small_card(), keys=ring)
    service.scheduler.stream_lane = lambda key: Refusing(*errors)
    if parameters is None:
        reply = service.post("small/filter", {"frames": FRAMES}, headers=BOB)
    else:
        body = {"inputs": [TENSOR], "parameters": parameters}
        reply = service.run(service.http.post("/v2/models/small/infer", json=body, headers=BOB))
    assert reply.status_code == (400 if parameters == {"sequence_id": 1} else 503 if errors[0] else 500), reply.text
    quota = ring.callers["bob"].quota
    assert quota is not None
    assert quota._left == pytest.approx(10.0, abs=0.01)
