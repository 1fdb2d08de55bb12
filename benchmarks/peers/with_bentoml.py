"""BentoML: a batchable API. Rows come as one array whose last column is the number of steps: it batches along one input only.

    python benchmarks/peers/with_bentoml.py --artifact DIR --port N --batch 32 --window-ms 20 --workers 1 --threads 1

`window_ms` is `max_latency_ms`.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import bentoml
import numpy as np
from _options import read_options
from bentoml.validators import DType
from programs import Programs

OPTIONS = read_options(os.environ["PEER_OPTIONS"].split("\n") if "PEER_OPTIONS" in os.environ else None)
Rows = Annotated[np.ndarray, DType("float32")]


@bentoml.service(workers=OPTIONS.workers, traffic={"timeout": 60}, logging={"access": {"enabled": False}}, metrics={"enabled": False})
class Encoder:
    def __init__(self) -> None:
        self._programs = Programs(OPTIONS.artifact, OPTIONS.threads)

    @bentoml.api(batchable=True, batch_dim=0, max_batch_size=OPTIONS.batch, max_latency_ms=round(OPTIONS.window_ms), route="/encode")
    def encode(self, inputs: Rows) -> Rows:
        """(R, X + 1): x and steps -> (R, 2 D + 1): mu, log_sigma and elbo."""
        mu, log_sigma, elbo = self._programs.encode(np.ascontiguousarray(inputs[:, :-1]), inputs[:, -1].astype(int))
        return np.concatenate([mu, log_sigma, elbo[:, None]], axis=1)


if __name__ == "__main__":
    os.environ["PEER_OPTIONS"] = "\n".join(sys.argv[1:])  # for the processes that bentoml starts
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "true")
    here = ["--working-dir", str(Path(__file__).parent), "--host", "127.0.0.1", "--port", str(OPTIONS.port)]
    os.execv(sys.executable, [sys.executable, "-m", "bentoml", "serve", "with_bentoml:Encoder", *here])
