"""The server of the soak: the one that ships, on engines that are made to fail now and then, and that does not outlive its soak.

    python benchmarks/_soak_server.py FAIL_EVERY IDLE_S      everything else from ELBOW_ variables, as elbow-serve run has it

Each FAIL_EVERY-th step of a static model, and frame of a filter, raises in the engine process (_soak_engine.py). After IDLE_S seconds
without a request the server ends.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"


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
    from service.apart import remote
    from service.app import create_app
    from service.process import serve
    from service.scheduler.scheduler import SWITCH_INTERVAL_S
    from service.settings import read_settings
    from service.telemetry import configure_logging

    remote.COMMAND = ("-P", str(Path(__file__).with_name("_soak_engine.py")), str(fail_every))
    settings = read_settings(flags={"engine_process": "on"})
    configure_logging(settings.log_level)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    app = create_app(settings)
    end_when_idle(app.state.metrics, idle_s)
    serve(app, settings, app.state.metrics)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
