"""The server of the soak: the one that ships, on engines that are made to fail now and then, and that does not outlive its soak.

    python benchmarks/_soak_server.py FAIL_EVERY IDLE_S      everything else from ELBOW_ variables, as elbow-serve run has it

Each FAIL_EVERY-th step of a static model, and frame of a filter, raises in the engine. After IDLE_S seconds without a request the
server ends.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from itertools import count
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"


def make_engines_fail(every: int, serving: Callable[[], bool]) -> None:
    """`serving`: whether models are loaded; before that, a failure would only refuse them."""
    from service.engine.onnx import OnnxEngine

    run, calls = OnnxEngine.run, {"static": count(1), "filter": count(1)}

    def failing(self: Any, program: str, arrays: Any) -> Any:
        if program in ("step", "frame_K") and serving() and next(calls[self.card.family]) % every == 0:
            raise RuntimeError("injected failure")
        return run(self, program, arrays)

    OnnxEngine.run = failing  # type: ignore[method-assign]


def end_when_idle(metrics: Any, seconds: float) -> None:
    """SIGTERM to ourselves when the count of requests has stood still for so long."""

    def watch() -> None:
        seen, since = -1.0, time.monotonic()
        while time.monotonic() - since < seconds:
            time.sleep(1.0)
            answered = sum(sample.value for metric in metrics.requests.collect() for sample in metric.samples)
            if answered != seen:
                seen, since = answered, time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def main(fail_every: int, idle_s: float) -> None:
    from service.app import create_app
    from service.process import serve
    from service.scheduler.scheduler import SWITCH_INTERVAL_S
    from service.settings import read_settings
    from service.telemetry import configure_logging

    settings = read_settings()
    configure_logging(settings.log_level)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    app = create_app(settings)
    make_engines_fail(fail_every, lambda: hasattr(app.state, "server"))
    end_when_idle(app.state.metrics, idle_s)
    serve(app, settings, app.state.metrics)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
