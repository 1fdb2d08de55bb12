"""What every peer runs: the exported ONNX programs of a static artifact, for a batch in which each row has its own number of steps.

`encode` is what a competent user of a batching server writes: rows that have their steps leave the batch, and the ELBO is
measured once, at the end. It needs numpy and onnxruntime only, because it lives in the peer's environment, not in Elbow's.

Shapes: R rows, S samples, D latent size, X size of x.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime as ort


class Programs:
    """init, step and score of one artifact, one session each, with `threads` threads per operator."""

    def __init__(self, artifact: Path | str, threads: int):
        artifact = Path(artifact)
        card = json.loads((artifact / "artifact.json").read_text())
        (level,) = card["levels"]
        self.size, self.samples = level["size"], card["samples"]
        self._random = np.random.default_rng(0)
        self._run = {name: _program(artifact / f"{name}.onnx", threads) for name in ("init", "step", "score")}

    def encode(self, x: Any, steps: Any) -> tuple[Any, Any, Any]:
        """x (R, X) float32 and steps (R,) -> mu (R, D), log_sigma (R, D), elbo (R,)."""
        mask = np.ones_like(x)
        mu, log_sigma, context = self._run["init"](x, mask)
        order = np.argsort(-steps, kind="stable")  # the rows that still refine are always the first
        x, mask, mu, log_sigma, context = (value[order] for value in (x, mask, mu, log_sigma, context))
        left = steps[order]
        for done in range(int(left[0]) if len(left) else 0):
            n = int(np.count_nonzero(left > done))
            half = self._random.standard_normal((n, self.samples // 2, self.size), np.float32)
            noise = np.concatenate([half, -half], axis=1)  # antithetic, as the model was trained
            mu[:n], log_sigma[:n], _ = self._run["step"](x[:n], mask[:n], context[:n], mu[:n], log_sigma[:n], noise)
        measure = self._random.standard_normal((len(x), 1, self.size), np.float32)
        log_likelihood, kl, _ = self._run["score"](x, mask, mu, log_sigma, measure)
        elbo = log_likelihood.mean(1) - kl.sum(1)
        back = np.argsort(order, kind="stable")
        return mu[back], log_sigma[back], elbo[back]


def _program(file: Path, threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    return lambda *arrays: session.run(None, dict(zip(names, arrays, strict=True)))
