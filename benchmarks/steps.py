"""µs of one refinement step on the shipped model: eager autograd, TorchScript, ONNX Runtime, and the floor of this machine.

    python benchmarks/steps.py [--artifact checkpoints/mnist-iterative/1] [--seconds 5]

The package must be installed with its `train` extra (`make bench` does). For each number of threads one fresh process; in
it, for each batch, all contenders in turn, medians over all rounds (_timing.py).

- eager: plain PyTorch with `torch.autograd.grad` (_model.py), checked to give what the served program gives;
- TorchScript, ONNX Runtime: `run` of the service's own engines, numpy in and numpy out;
- floor: see _floor.py, measured in the same process.

Noise is drawn beforehand and counts for nobody.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _report import artifact_name, keep, table
from _timing import time_in_turn

ARTIFACT = Path(__file__).parents[1] / "checkpoints" / "mnist-iterative" / "1"
BATCHES, THREADS = (1, 8, 64, 256), (1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, default=ARTIFACT)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each batch and number of threads, and as much for its floor")
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)  # the child's
    args = parser.parse_args()
    if args.threads:
        print(json.dumps(measure(args.artifact, args.threads, args.seconds)))
        return
    results = [row for threads in THREADS for row in in_a_fresh_process(args.artifact, threads, args.seconds)]
    ratios = ("onnx/eager", "torchscript/eager", "onnx/floor")
    columns = ("threads", "batch", "eager", "torchscript", "onnx", "floor", "matrices", "reading", "GFLOP/s", *ratios)
    print(f"µs per step, medians; {args.artifact}")
    print(table(columns, [[row[column] for column in columns] for row in results]))
    print(f"kept in {keep('steps', {'artifact': artifact_name(args.artifact), 'seconds': args.seconds, 'steps': results})}")


def in_a_fresh_process(artifact: Path, threads: int, seconds: float) -> list[dict[str, Any]]:
    """Thread pools are sized once per process."""
    command = [sys.executable, __file__, "--artifact", str(artifact), "--threads", str(threads), "--seconds", str(seconds)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "ORT_DISABLE_TELEMETRY": "1"}
    return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)


def measure(path: Path, threads: int, seconds: float) -> list[dict[str, Any]]:
    """One row of the table per batch."""
    import numpy as np
    import torch
    from _floor import measure_floor, step_products
    from _model import PlainEager, eager_model

    from models.artifact import Artifact
    from service.engine.onnx import OnnxEngine
    from service.engine.torchscript import TorchScriptEngine

    torch.set_num_threads(threads)
    artifact = Artifact.open(path)
    engines = {"torchscript": TorchScriptEngine(artifact, threads=threads), "onnx": OnnxEngine(artifact, threads=threads)}
    model, card = eager_model(artifact), artifact.card
    plain = PlainEager(model)
    generator = np.random.default_rng(0)
    rows = []
    for batch in BATCHES:
        x = (generator.random((batch, *card.x.shape)) < 0.2).astype(np.float32)
        arrays = {"x": x, "mask": np.ones_like(x)}
        arrays |= engines["onnx"].run("init", arrays)
        arrays["noise0"] = generator.standard_normal((batch, card.samples, card.levels[0].size), np.float32)
        tensors = [torch.from_numpy(arrays[spec.name]) for spec in card.programs["step"].inputs]
        check_equal(plain.step(*tensors), engines["onnx"].run("step", arrays))
        calls: dict[str, Callable[[], object]] = {"eager": lambda tensors=tensors: plain.step(*tensors)}  # type: ignore[misc]
        for name, engine in engines.items():
            calls[name] = lambda engine=engine, arrays=arrays: engine.run("step", arrays)  # type: ignore[misc]
        medians = time_in_turn(calls, seconds)
        floor = measure_floor(step_products(model, batch, card.samples), threads, seconds)
        rows.append(
            {"threads": threads, "batch": batch, **medians, "floor": floor.us, "matrices": floor.matrix_us, "reading": floor.reading_us}
            | {"GFLOP/s": floor.gflops, "onnx/eager": medians["onnx"] / medians["eager"], "onnx/floor": medians["onnx"] / floor.us}
            | {"torchscript/eager": medians["torchscript"] / medians["eager"], "floor_details": asdict(floor)}
        )
    return rows


def check_equal(eager: Any, served: dict[str, Any]) -> None:
    """Raises AssertionError if the baseline does not compute the served step."""
    import numpy as np

    for mine, theirs in zip(eager, served.values(), strict=True):
        np.testing.assert_allclose(mine.numpy(), theirs, rtol=1e-3, atol=1e-3)


if __name__ == "__main__":
    main()
