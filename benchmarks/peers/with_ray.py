"""Ray Serve: a deployment with `serve.batch`, asked over plain HTTP.

    python benchmarks/peers/with_ray.py --artifact DIR --port N --batch 32 --window-ms 2 --workers 1 --threads 1

`workers` is the number of replicas.
"""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import numpy as np
import ray
from _options import Options, read_options
from ray import serve
from starlette.requests import Request


def application(options: Options) -> Any:
    @serve.deployment(num_replicas=options.workers, max_ongoing_requests=256, ray_actor_options={"num_cpus": 0})
    class Encoder:
        def __init__(self) -> None:
            from programs import Programs

            self._programs = Programs(options.artifact, options.threads)

        @serve.batch(max_batch_size=options.batch, batch_wait_timeout_s=options.window_ms / 1e3)
        async def encode(self, rows: list[tuple[Any, int]]) -> list[dict[str, Any]]:
            x, steps = np.stack([x for x, _ in rows]), np.array([steps for _, steps in rows])
            answers = zip(*await asyncio.to_thread(self._programs.encode, x, steps), strict=True)
            return [{"mu": mu.tolist(), "log_sigma": log_sigma.tolist(), "elbo": float(elbo)} for mu, log_sigma, elbo in answers]

        async def __call__(self, request: Request) -> dict[str, Any]:
            body = await request.json()
            return await self.encode((np.asarray(body["inputs"][0], np.float32), body["steps"]))

    return Encoder.bind()


if __name__ == "__main__":
    options = read_options()
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    serve.run(application(options), route_prefix="/encode")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()
