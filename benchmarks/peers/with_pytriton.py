"""Triton Inference Server, through PyTriton: its dynamic batcher in front of a Python function.

python benchmarks/peers/with_pytriton.py --artifact DIR --port N --batch 32 --window-ms 2 --workers 1 --threads 1
"""

from __future__ import annotations

import os
import sysconfig
from typing import Any

import numpy as np
from _options import Options, read_options
from programs import Programs
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig


def encoder(options: Options) -> Any:
    """One instance of the model: what `workers` counts."""
    programs = Programs(options.artifact, options.threads)

    @batch
    def encode(x: Any, steps: Any) -> dict[str, Any]:
        mu, log_sigma, elbo = programs.encode(x, steps[:, 0])
        return {"mu": mu, "log_sigma": log_sigma, "elbo": elbo[:, None]}

    return encode


def serve(options: Options) -> None:
    config = TritonConfig(
        http_address="127.0.0.1", http_port=options.port, grpc_port=options.port + 1, metrics_port=options.port + 2, log_verbose=0
    )
    with Triton(config=config) as triton:
        triton.bind(
            model_name="encode",
            infer_func=[encoder(options) for _ in range(options.workers)],
            inputs=[Tensor(name="x", dtype=np.float32, shape=(-1,)), Tensor(name="steps", dtype=np.int32, shape=(1,))],
            outputs=[Tensor(name=name, dtype=np.float32, shape=(-1,)) for name in ("mu", "log_sigma", "elbo")],
            config=ModelConfig(
                max_batch_size=options.batch, batcher=DynamicBatcher(max_queue_delay_microseconds=round(options.window_ms * 1e3))
            ),
        )
        triton.serve()


if __name__ == "__main__":
    # Triton embeds Python: its library must be the one this interpreter's modules belong to, not the system's
    libraries = (sysconfig.get_config_var("LIBDIR"), os.environ.get("LD_LIBRARY_PATH"))
    os.environ["LD_LIBRARY_PATH"] = ":".join(filter(None, libraries))
    serve(read_options())
