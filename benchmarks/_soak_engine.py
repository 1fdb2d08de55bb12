"""The engine process of the soak's server: each so many steps of a static model, and frames of a filter, one raises in the engine.

    python benchmarks/_soak_engine.py FAIL_EVERY FD      started by _soak_server.py in place of service.apart.engine_process

Until the first request nothing fails: a failure before that would only refuse the models.
"""

from __future__ import annotations

import socket
import sys
from itertools import count
from typing import Any

from service.apart import engine_process
from service.engine.onnx import OnnxEngine


def make_engines_fail(every: int) -> None:
    run, handle = OnnxEngine.run, engine_process.EngineProcess.handle
    calls = {"static": count(1), "filter": count(1)}
    serving = False

    def failing(self: Any, program: str, arrays: Any) -> Any:
        if program in ("step", "frame_K") and serving and next(calls[self.card.family]) % every == 0:
            raise RuntimeError("injected failure")
        return run(self, program, arrays)

    def handling(self: Any, message: Any) -> None:
        nonlocal serving
        serving = serving or message[0] in ("submit", "feed")
        handle(self, message)

    OnnxEngine.run = failing  # type: ignore[method-assign]
    engine_process.EngineProcess.handle = handling  # type: ignore[method-assign]


if __name__ == "__main__":
    make_engines_fail(int(sys.argv[1]))
    engine_process.main(socket.socket(fileno=int(sys.argv[2])))
