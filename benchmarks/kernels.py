"""Fewer kernels: what one step launches, and what fusing it gains: TorchScript with and without its fuser, AOTInductor.

    python benchmarks/kernels.py --device cuda [--artifacts checkpoints] [--seconds 2]
    python benchmarks/kernels.py --device cpu --batches 1 64

All of the same traced graph of `step`, on tensors that are already on the device, in turn, medians. "kernels" are device
kernels on a GPU; on the CPU they are the operators of torch that compute (views do not count, nor the loops that AOTInductor
compiles). On a GPU each is also timed inside a CUDA graph, which is how it would be served; on the CPU ONNX Runtime stands beside them,
since it is what is served there. AOTInductor is built here, once, for any batch.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _model import eager_model
from _report import artifact_name, keep, table
from _timing import time_in_turn
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from models.artifact import Artifact
from models.programs import static_programs
from service.engine.torchscript import load_programs
from training.tracing import TRACE_SIZES, _WithWeights, example_inputs, trace

ROOT = Path(__file__).parents[1]
_VIEWS = ("view", "reshape", "t", "transpose", "unsqueeze", "squeeze", "expand", "slice", "select", "as_strided", "split", "detach", "size")
_INSIDE = ("empty", "resize", "copy_", "to", "_to_copy", "contiguous", "clone")
Step = Callable[[Sequence[Tensor]], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--artifacts", type=Path, default=ROOT / "checkpoints")
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 8, 64, 256))
    parser.add_argument("--seconds", type=float, default=2.0, help="for each batch")
    parser.add_argument("--keep", default="kernels", help="results/<KEEP>.json; nothing: not kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device, path = torch.device(args.device), args.artifacts / "mnist-iterative" / "1"
    artifact = Artifact.open(path)
    steps, unavailable = contenders(artifact, device)
    rows = []
    for batch in args.batches:
        inputs = [value.to(device) for value in batch_of(artifact, batch)]
        with torch.inference_mode():
            expected = steps["torchscript"](inputs)
            for step in steps.values():
                for a, b in zip(step(inputs), expected, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
            calls = {name: finished(step, inputs, device) for name, step in steps.items()}
            if device.type == "cuda":
                calls |= {f"{name}, graph": graphed(step, inputs) for name, step in steps.items()}
            medians = time_in_turn(calls, args.seconds)
            counts = {name: kernels(step, inputs, device) if name != "onnx" else "-" for name, step in steps.items()}
        base = medians["torchscript, graph" if device.type == "cuda" else "torchscript"]
        rows += [
            {"batch": batch, "step": name, "kernels": counts[name.removesuffix(", graph")], "us": us, "us/torchscript": us / base}
            for name, us in medians.items()
        ]
    print(f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU, one thread'}, torch {torch.__version__}")
    for name, why in unavailable.items():
        print(f"not available: {name}: {why}")
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    results = {"artifact": artifact_name(path), "device": str(device), "not_available": unavailable, "steps": rows}
    if args.keep:
        print(f"kept in {keep(args.keep, results)}")


def contenders(artifact: Artifact, device: torch.device) -> tuple[dict[str, Step], dict[str, str]]:
    """By name; and of those that cannot be had here, why."""
    found: dict[str, Step] = {"torchscript": loaded(artifact, device, fuser=True)}
    missing: dict[str, str] = {}
    if device.type == "cuda":
        found["torchscript, unfused"] = loaded(artifact, device, fuser=False)
    else:
        found["onnx"] = onnx_runtime(artifact)
        if not torch._C._llvm_enabled():
            missing["TorchScript's fuser"] = "this torch was built without LLVM, which NNC needs on a CPU"
    try:
        found["aotinductor"] = aot_inductor(artifact, device)
    except Exception as exc:  # no compiler, or one that this graph is too much for: the table says so
        missing["aotinductor"] = f"{type(exc).__name__}: {str(exc).splitlines()[0][:200]}"
    return found, missing


def loaded(artifact: Artifact, device: torch.device, fuser: bool) -> Step:
    """The stored TorchScript. Whether NNC fuses is decided while the first calls are compiled."""
    module = load_programs(artifact, device)["step"]
    before = torch._C._jit_texpr_fuser_enabled()
    torch._C._jit_set_texpr_fuser_enabled(fuser)
    with torch.inference_mode():
        for rows in (64, 64, 8, 8, 1, 1, 256, 256):
            module(*(value.to(device) for value in batch_of(artifact, rows)))
    torch._C._jit_set_texpr_fuser_enabled(before)
    return lambda inputs: module(*inputs)


def onnx_runtime(artifact: Artifact) -> Step:
    """What the service runs on a CPU."""
    from service.engine.onnx import OnnxEngine

    engine = OnnxEngine(artifact)
    names = [spec.name for spec in artifact.card.programs["step"].inputs]

    def run(inputs: Sequence[Tensor]) -> Any:
        outputs = engine.run("step", {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
        return [torch.from_numpy(value) for value in outputs.values()]

    return run


def aot_inductor(artifact: Artifact, device: torch.device) -> Step:
    """The traced graph through torch.export and AOTInductor, loaded again from its package."""
    model = eager_model(artifact)
    program = static_programs(model).programs["step"]
    graph, used = trace(model, program)
    weights = dict(model.named_parameters())
    module = _WithWeights(graph, {name: weights[name].detach() for name in used}).to(device)
    dimensions = {size: torch.export.Dim(size, min=1) for size in TRACE_SIZES}
    shapes = tuple({axis: dimensions[n] for axis, n in enumerate(spec.shape) if isinstance(n, str)} for spec in program.inputs)
    inputs = tuple(value.to(device) for value in example_inputs(program))
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        exported = torch.export.export(module, inputs, dynamic_shapes=(shapes,), strict=False)
        package = torch._inductor.aoti_compile_and_package(exported, package_path=f"{folder}/step.pt2")
        loaded = torch._inductor.aoti_load_package(package)
    return lambda inputs: loaded(*inputs)


def batch_of(artifact: Artifact, rows: int) -> list[Tensor]:
    """Real rows and a real λ: those of the reference, over and over."""
    inputs, _ = artifact.reference()["step"]
    arrays = [torch.from_numpy(inputs[spec.name].astype("float32")) for spec in artifact.card.programs["step"].inputs]
    return [value[torch.arange(rows) % len(value)].contiguous() for value in arrays]


def finished(step: Step, inputs: Sequence[Tensor], device: torch.device) -> Callable[[], None]:
    """A call that is over when the device is."""

    def call() -> None:
        step(inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return call


def graphed(step: Step, inputs: Sequence[Tensor]) -> Callable[[], None]:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(5):
            step(inputs)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step(inputs)

    def call() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return call


def kernels(step: Step, inputs: Sequence[Tensor], device: torch.device) -> int | str:
    """How many one call launches."""
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=kinds) as seen:
        step(inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    events = seen.events() or []
    if device.type == "cuda":
        return sum(event.device_type.name == "CUDA" for event in events)
    names = [event.name.removeprefix("aten::") for event in events if event.name.startswith("aten::")]
    return sum(not name.startswith((*_VIEWS, *_INSIDE)) for name in names)


if __name__ == "__main__":
    main()
