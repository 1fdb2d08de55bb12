"""LitServe: batch, predict, unbatch.

python benchmarks/peers/with_litserve.py --artifact DIR --port N --batch 32 --window-ms 2 --workers 1 --threads 1
"""

from __future__ import annotations

from typing import Any

import litserve as ls
import numpy as np
from _options import Options, read_options
from programs import Programs


class Encoder(ls.LitAPI):
    def __init__(self, options: Options):
        super().__init__(max_batch_size=options.batch, batch_timeout=options.window_ms / 1e3, api_path="/encode")
        self._options = options

    def setup(self, device: str) -> None:
        self._programs = Programs(self._options.artifact, self._options.threads)

    def decode_request(self, request):
        return np.asarray(request["inputs"][0], np.float32), request["steps"]

    def batch(self, inputs: list[tuple[Any, int]]) -> tuple[Any, Any]:
        return np.stack([x for x, _ in inputs]), np.array([steps for _, steps in inputs])

    def predict(self, batch: tuple[Any, Any]) -> tuple[Any, Any, Any]:
        return self._programs.encode(*batch)

    def unbatch(self, output: tuple[Any, Any, Any]) -> list[tuple[Any, Any, Any]]:
        return list(zip(*output, strict=True))

    def encode_response(self, output):
        mu, log_sigma, elbo = output
        return {"mu": mu.tolist(), "log_sigma": log_sigma.tolist(), "elbo": float(elbo)}


if __name__ == "__main__":
    options = read_options()
    server = ls.LitServer(Encoder(options), accelerator="cpu", workers_per_device=options.workers, timeout=60)
    server.run(host="127.0.0.1", port=options.port, num_api_servers=options.api_servers, generate_client_file=False, log_level="error")
