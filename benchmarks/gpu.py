"""Serving on a device: µs per step and per frame by batch, how near the floor, streams, whole-batch requests, memory per slot.

    python benchmarks/gpu.py --device cuda [--artifacts checkpoints] [--seconds 1]
    python benchmarks/gpu.py --device cpu --batches 1 8 --seconds 0.1      # the same code without graphs

- step, frame: `run_rows` of the device engine again and again, noise keys and (for frames) x going up each time, the last
  output waited for; so uploads and compute overlap as they do in service. In CUDA graphs where the device is a GPU.
- eager: the same TorchScript program on tensors that are already on the device, kernel by kernel.
- matrices: the products of a step alone, at the same shapes, in torch; share = matrices / step.
- bandwidth: reading the weights once per step, as a share of what a large sum reaches.
- streams: frames per second over `--frame-rate`.
- precisions: the traced step with its products in TF32, bfloat16 or float16: nats lost on validation images after the trained steps (init
  and score stay float32), how much a row changes with its batch, µs. What loses at most 0.05 nats and changes no row may be offered.
- requests: a .npy body of `batch` rows parsed, refined by the trained K through the scheduler, μ written as .npy; no HTTP.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _floor import step_products
from _model import eager_model
from _report import keep, table

from models.artifact import Artifact
from service.engine.torchscript_device import LARGEST_BUCKET, TorchScriptDeviceEngine
from service.noise import Keys, Purpose, words
from service.scheduler.job import Ask, Budget, Job
from service.scheduler.scheduler import Scheduler
from service.streams.frame_noise import FrameNoise
from training.checkpoint import load_static
from training.data.binarise import observe
from training.evaluate import BINARISE_SEED
from training.precision import nats

ROOT = Path(__file__).parents[1]
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--artifacts", type=Path, default=ROOT / "checkpoints")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each figure")
    parser.add_argument("--frame-rate", type=float, default=80.0, help="frames a second of one stream")
    parser.add_argument("--validation-rows", type=int, default=5000, help="that a precision's cost is measured on; 0: leave that out")
    parser.add_argument("--data", help="folder of data sets (default: as elbow-train finds them)")
    parser.add_argument("--keep", default="gpu", help="results/<KEEP>.json; nothing: not kept")
    args = parser.parse_args()
    device = torch.device(args.device)
    bench = Bench(device, args.seconds)
    bandwidth = bench.bandwidth()
    steps = measure_steps(bench, Artifact.open(args.artifacts / "mnist-iterative" / "1"), args.batches, bandwidth)
    frames = measure_frames(bench, Artifact.open(args.artifacts / "speech-filter" / "1"), args.batches, args.frame_rate)
    requests = measure_requests(bench, Artifact.open(args.artifacts / "mnist-iterative" / "1"), args.batches)
    precisions = measure_precisions(bench, args.artifacts / "mnist-iterative" / "1", args.batches, args.validation_rows, args.data)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, one thread"
    print(f"{machine}, torch {torch.__version__}; reading {bandwidth / 1e9:.0f} GB/s")
    for title, rows in (
        ("mnist-iterative, one step", steps),
        ("speech-filter, one frame", frames),
        ("whole-batch requests", requests),
        ("mnist-iterative, precision of a step's products", precisions),
    ):
        print(f"\n{title}")
        print(table(list(rows[0]), [list(row.values()) for row in rows]) if rows else "left out")
    results = {"device": machine, "bandwidth_gbs": bandwidth / 1e9, "steps": steps, "frames": frames, "requests": requests}
    results["precisions"] = precisions
    if args.keep:
        print(f"\nkept in {keep(args.keep, results)}")


class Bench:
    """Times things on a device for about so many seconds each."""

    def __init__(self, device: torch.device, seconds: float):
        self.device, self.seconds = device, seconds
        torch.set_num_threads(1)

    def us(self, call: Callable[[], object], wait: Callable[[], object] | None = None) -> float:
        """Median over rounds of the mean µs of a call; `wait` (default: for the device) ends a round."""
        wait = wait or self.wait
        for _ in range(4):
            call()
        wait()
        began = time.perf_counter()
        call()
        wait()
        calls = max(3, int(self.seconds / ROUNDS / max(1e-6, time.perf_counter() - began)))
        rounds = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            for _ in range(calls):
                call()
            wait()
            rounds.append((time.perf_counter() - began) / calls)
        return 1e6 * statistics.median(rounds)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def bandwidth(self) -> float:
        """Bytes per second of reading."""
        numbers = torch.ones((256 if self.device.type == "cuda" else 16) << 20, device=self.device)
        return 4 * numbers.numel() / (1e-6 * self.us(numbers.sum))


def measure_steps(bench: Bench, artifact: Artifact, batches: list[int], bandwidth: float) -> list[dict[str, Any]]:
    engine = TorchScriptDeviceEngine(artifact, str(bench.device))
    card, model = artifact.card, eager_model(artifact)
    engine.allocate(min(LARGEST_BUCKET, max(batches)))
    size, rows = card.levels[0].size, []
    for batch in batches:
        slots = np.arange(batch)
        x = (np.random.default_rng(0).random((batch, *card.x.shape)) < 0.2).astype(np.float32)
        engine.load_rows(slots, {"x": x, "mask": np.ones_like(x)})
        engine.run_rows("init", slots, {})
        word = words(np.zeros((batch, 1), np.int64), level=0, purpose=Purpose.REFINE)
        zero = np.zeros(batch, np.int64)
        keys = Keys(np.arange(batch, dtype=np.uint64), word, zero, zero, card.samples, size, (card.samples, size), card.antithetic)
        step = bench.us(lambda slots=slots, keys=keys: engine.run_rows("step", slots, {"noise0": keys}))  # type: ignore[misc]
        module, inputs = engine._modules["step"], eager_inputs(engine, batch)
        with torch.inference_mode():
            eager = bench.us(lambda module=module, inputs=inputs: module(*inputs))  # type: ignore[misc]
            products = step_products(model, batch, card.samples)
            matrices = bench.us(product_calls(products, bench.device))
        weights = sum(p.weight_bytes for p in products)
        rows.append(
            {"batch": batch, "step_us": step, "eager_us": eager, "matrices_us": matrices, "share of matrix rate": matrices / step}
            | {"TFLOP/s": 1e-6 * sum(p.operations for p in products) / step, "share of bandwidth": weights / (1e-6 * step) / bandwidth}
            | {"step/eager": step / eager, "slot_bytes": engine.slot_bytes}
        )
    engine.close()
    return rows


def eager_inputs(engine: TorchScriptDeviceEngine, batch: int) -> list[torch.Tensor]:
    """What a step reads, on the device."""
    sizes: dict[int | str, int] = {"rows": batch, "samples": engine.card.samples}
    shapes = [[int(sizes.get(n, n)) for n in t.shape] for t in engine.card.programs["step"].inputs]
    return [torch.rand(shape, device=engine._place) for shape in shapes]


def product_calls(products: list[Any], device: torch.device) -> Callable[[], None]:
    """All matrix products of a step, one after another."""
    pairs = [(torch.rand(p.rows, p.inputs, device=device), torch.rand(p.inputs, p.outputs, device=device)) for p in products]

    def run() -> None:
        for a, b in pairs:
            torch.mm(a, b)

    return run


def measure_frames(bench: Bench, artifact: Artifact, batches: list[int], frame_rate: float) -> list[dict[str, Any]]:
    engine = TorchScriptDeviceEngine(artifact, str(bench.device))
    engine.allocate(min(LARGEST_BUCKET, max(batches)))
    noise, rows = FrameNoise(artifact.card, keyed=True), []
    for batch in batches:
        slots = np.arange(batch)
        begin = {name: np.repeat(value[None], batch, 0) for name, value in engine.begin.items()}
        engine.load_rows(slots, begin)
        x = np.random.default_rng(0).standard_normal((batch, *artifact.card.x.shape)).astype(np.float32) * 0.05
        given = {"x": x, "mask": np.ones_like(x), **noise.blank("frame_K", batch)}
        last: list[Any] = []

        def frame(slots: Any = slots, given: Any = given, last: list[Any] = last) -> None:
            outputs = engine.run_rows("frame_K", slots, given, guard="log_likelihood")
            if last:
                last.pop()["log_likelihood"]  # one tick late, as a lane would look at it
            last.append(outputs)

        us = bench.us(frame)
        rows.append(
            {"batch": batch, "frame_us": us, "us per stream": us / batch, "frames/s": 1e6 * batch / us}
            | {f"streams at {frame_rate:g}/s": int(1e6 * batch / us / frame_rate), "slot_bytes": engine.slot_bytes}
        )
    engine.close()
    return rows


def measure_requests(bench: Bench, artifact: Artifact, batches: list[int]) -> list[dict[str, Any]]:
    scheduler, rows = Scheduler(slots=max(batches), queue_rows=8 * LARGEST_BUCKET, tick_s=0.05), []
    engine = TorchScriptDeviceEngine(artifact, str(bench.device))
    scheduler.add_model("m", engine)
    steps = artifact.card.trained_steps
    for batch in batches:
        body, seeds = io.BytesIO(), np.arange(batch, dtype=np.uint64)
        np.save(body, (np.random.default_rng(0).random((batch, *artifact.card.x.shape)) < 0.2).astype(np.float32))

        def request(raw: bytes = body.getvalue(), seeds: Any = seeds) -> None:
            ticket = scheduler.enqueue(Job("m", seeds, Budget(steps=steps), Ask(samples=1), x=np.load(io.BytesIO(raw))))
            scheduler.drain()
            if isinstance(ticket.outcome, BaseException) or ticket.outcome is None:
                raise RuntimeError("a request was not answered") from ticket.outcome
            np.save(io.BytesIO(), ticket.outcome.carry["q0.mu"])

        us = bench.us(request)
        per_second = 1e6 / us
        rows.append(
            {"rows": batch, "ms": us / 1e3, "requests/s": per_second}
            | {"rows/s": batch * per_second, "row-steps/s": batch * steps * per_second}
        )
    engine.close()
    return rows


@contextmanager
def products_in(precision: str, device: torch.device) -> Iterator[None]:
    """Matrix products of what runs inside are made in `precision`."""
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "TF32"
    try:
        with nullcontext() if dtype is None else torch.autocast(device.type, dtype, cache_enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def measure_precisions(bench: Bench, folder: Path, batches: list[int], validation_rows: int, data: str | None) -> list[dict[str, Any]]:
    if not validation_rows:
        return []
    model, run, _ = load_static(folder)
    engine = TorchScriptDeviceEngine(Artifact.open(folder), str(bench.device))
    images = run.data.load(data)
    pixels = torch.as_tensor(images.valid[:validation_rows]).reshape(-1, *engine.card.x.shape)
    x = observe(pixels, images.kind, run.architecture.generative.likelihood, torch.Generator().manual_seed(BINARISE_SEED))
    rows: list[dict[str, Any]] = []
    plain: torch.Tensor | None = None
    for precision in ("float32", "TF32", "bfloat16", "float16") if bench.device.type == "cuda" else ("float32", "bfloat16"):
        runners = {program: program_on(engine, program, precision if program == "step" else "float32") for program in ("init", "step")}
        found = nats(engine.card, runners, model, x, samples=20).double()
        plain = found if plain is None else plain
        lost = plain - found
        row: dict[str, Any] = {"products": precision, "nats lost": float(lost.mean())}
        row["standard error"] = float(lost.std() / len(lost) ** 0.5)
        inputs = [tensor[: min(64, max(batches))] for tensor in eager_inputs(engine, max(batches))]
        with torch.inference_mode(), products_in(precision, bench.device):
            step = engine._modules["step"]
            together, alone = step(*inputs), step(*(tensor[:1] for tensor in inputs))
            row["row in a batch"] = max(float((a[:1] - b).abs().max()) for a, b in zip(together, alone, strict=True))
            for batch in batches:
                given = eager_inputs(engine, batch)
                row[f"µs at {batch}"] = bench.us(lambda step=step, given=given: step(*given))  # type: ignore[misc]
        rows.append(row)
    engine.close()
    return rows


def program_on(engine: TorchScriptDeviceEngine, program: str, precision: str) -> Callable[[Any], Any]:
    """A traced program of host arrays by name."""
    spec, module, device = engine.card.programs[program], engine._modules[program], engine._place

    def run(arrays: Any) -> Any:
        inputs = [torch.as_tensor(arrays[tensor.name]).to(device) for tensor in spec.inputs]
        with torch.inference_mode(), products_in(precision, device):
            made = module(*inputs)
        outputs = (made,) if isinstance(made, torch.Tensor) else made
        return {tensor.name: output.float().cpu().numpy() for tensor, output in zip(spec.outputs, outputs, strict=True)}

    return run


if __name__ == "__main__":
    main()
