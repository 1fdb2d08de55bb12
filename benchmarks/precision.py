"""What reduced precision costs and brings on this CPU: nats, and µs of one refinement step by batch.

    python benchmarks/precision.py [--artifact checkpoints/mnist-iterative/1] [--data FOLDER] [--rows 1000] [--seconds 3]

The package must be installed with its `train` extra (`make bench` does); the data set is found as by `elbow-train`
(ELBOW_DATA, or --data). One step of the shipped model in four forms, one thread, batches in turn, medians (_timing.py):

- float32: the artifact's `step` in ONNX Runtime, as it is served;
- int8: its matrices quantised per column by onnxruntime.quantization.quantize_dynamic (activations at run time, per array; u8 × s8);
- float32 ts: the artifact's `step` as TorchScript, which bf16 has to be compared with;
- bf16 ts: the same program traced again with its weights rounded and its matrix products in bfloat16 (oneDNN; avx512_bf16
  where the CPU has it), all else in float32.

Nats: the mean ELBO of validation images after the trained number of steps made by that form alone, with the same noise for
all, measured in float32 by 20 fresh samples per image. `init` is float32 everywhere. Cost: against float32; its standard
error is that of the difference per image.
"""

from __future__ import annotations

import argparse
import copy
import io
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from _model import eager_model
from _report import artifact_name, keep, table
from _timing import time_in_turn
from onnx import numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn

from models.artifact import Arrays, Artifact
from models.catalogue import LatentModel
from models.programs import Program, as_posterior, static_programs
from service.engine.onnx import OnnxEngine
from service.engine.torchscript import TorchScriptEngine
from training.data.binarise import observe
from training.data.catalogue import load
from training.evaluate import measured
from training.step import fresh_noise
from training.tracing import to_torchscript, trace, weight_attribute

ARTIFACT = Path(__file__).parents[1] / "checkpoints" / "mnist-iterative" / "1"
SAMPLES = 20

Step = Callable[[Arrays], Arrays]
"""x, mask, context, carry and noise by name -> carry and the gradient's norm by name."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, default=ARTIFACT)
    parser.add_argument("--data", help="folder of data sets (default: as elbow-train finds them)")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 8, 64, 256))
    parser.add_argument("--seconds", type=float, default=3.0, help="for each batch")
    parser.add_argument("--keep", default="precision", help="results/<KEEP>.json; nothing: not kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    artifact = Artifact.open(args.artifact)
    served = OnnxEngine(artifact, threads=1)
    model = eager_model(artifact)
    steps = {
        "float32": lambda arrays: served.run("step", arrays),
        "int8": int8_step(artifact),
        "float32 ts": torchscript_step(artifact),
        "bf16 ts": bfloat16_step(model),
    }
    images = load(artifact.card.provenance["run"]["data"]["name"], args.data)
    x = observe(torch.as_tensor(images.valid[: args.rows]), images.kind, torch.Generator().manual_seed(1))
    values = {name: nats(model, artifact, served, step, x) for name, step in steps.items()}
    times = {batch: measure(artifact, served, steps, x[:batch], args.seconds) for batch in args.batches}
    rows = []
    for name, value in values.items():
        cost = values["float32"] - value
        row = {"step": name, "nats": float(value.mean()), "cost": float(cost.mean()), "±": float(cost.std() / len(cost) ** 0.5)}
        rows.append(row | {f"µs, batch {batch}": times[batch][name] for batch in args.batches})
    # three digits hide what precision costs
    shown = [{**row, "nats": f"{row['nats']:.3f}", "cost": f"{row['cost']:.4f}", "±": f"{row['±']:.4f}"} for row in rows]
    print(f"{artifact_name(args.artifact)}: {len(x)} rows, {artifact.card.trained_steps} steps, {SAMPLES} samples; one thread")
    print(table(list(shown[0]), [list(row.values()) for row in shown]))
    if args.keep:
        print(f"\nkept in {keep(args.keep, {'artifact': artifact_name(args.artifact), 'rows': len(x), 'samples': SAMPLES, 'steps': rows})}")


def nats(model: LatentModel, artifact: Artifact, served: OnnxEngine, step: Step, x: Tensor) -> Tensor:
    """Each row's ELBO after the trained number of steps, (B,)."""
    card, generator = artifact.card, torch.Generator().manual_seed(2)
    assert card.trained_steps is not None
    values = []
    for rows in x.split(250):
        arrays = {"x": rows.numpy(), "mask": np.ones_like(rows.numpy())}
        arrays |= served.run("init", arrays)
        for _ in range(card.trained_steps):
            arrays |= draw(artifact, len(rows), generator)
            arrays |= step(arrays)
        q = as_posterior([torch.as_tensor(arrays[spec.name]) for spec in card.carry])
        values.append(measured(model.generative, q, rows, SAMPLES, torch.Generator().manual_seed(3)))
    return torch.cat(values).double()


def measure(artifact: Artifact, served: OnnxEngine, steps: dict[str, Step], x: Tensor, seconds: float) -> dict[str, float]:
    """Median µs of each at x's batch."""
    arrays = {"x": x.numpy(), "mask": np.ones_like(x.numpy())}
    arrays |= served.run("init", arrays)
    arrays |= draw(artifact, len(x), torch.Generator().manual_seed(4))
    return time_in_turn({name: lambda step=step: step(arrays) for name, step in steps.items()}, seconds)


def draw(artifact: Artifact, rows: int, generator: torch.Generator) -> Arrays:
    card = artifact.card
    sizes = tuple(level.size for level in card.levels)
    noise = fresh_noise(sizes, rows, card.samples, card.antithetic, torch.device("cpu"), generator)
    return {f"noise{level}": part.numpy() for level, part in enumerate(noise)}


def int8_step(artifact: Artifact) -> Step:
    """`step` with int8 matrices in ONNX Runtime."""
    spec = artifact.card.programs["step"]
    proto = onnx.load(str(artifact.file(spec.files["onnx"])))
    _fold_transposes(proto)
    with tempfile.TemporaryDirectory() as folder:
        plain, quantised = Path(folder) / "plain.onnx", Path(folder) / "int8.onnx"
        onnx.save(proto, str(plain))
        quantize_dynamic(plain, quantised, per_channel=True, weight_type=QuantType.QInt8)
        left = [node.name for node in onnx.load(str(quantised)).graph.node if node.op_type in ("MatMul", "Gemm")]
        if left:
            raise SystemExit(f"int8: {len(left)} matrix products were left in float32: {left}")
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = ort.InferenceSession(str(quantised), options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    outputs = [output.name for output in spec.outputs]

    def step(arrays: Arrays) -> Arrays:
        feeds = {name: arrays[given.name] for name, given in zip(names, spec.inputs, strict=True)}
        return dict(zip(outputs, session.run(None, feeds), strict=True))

    return step


def _fold_transposes(proto: onnx.ModelProto) -> None:
    """Weights that the graph turns around become weights of their own: only these can be quantised."""
    weights = {initializer.name: initializer for initializer in proto.graph.initializer}
    # in the order of the graph, so that one turned back is folded too
    for node in [node for node in proto.graph.node if node.op_type == "Transpose"]:
        if node.input[0] in weights:
            turned = np.ascontiguousarray(numpy_helper.to_array(weights[node.input[0]]).T)
            weights[node.output[0]] = numpy_helper.from_array(turned, node.output[0])
            proto.graph.initializer.append(weights[node.output[0]])
            proto.graph.node.remove(node)
    read = {name for node in proto.graph.node for name in node.input}
    for unread in [initializer for initializer in proto.graph.initializer if initializer.name not in read]:
        proto.graph.initializer.remove(unread)


def torchscript_step(artifact: Artifact) -> Step:
    engine = TorchScriptEngine(artifact, threads=1)
    return lambda arrays: engine.run("step", arrays)


def bfloat16_step(model: LatentModel) -> Step:
    """`step` traced with bfloat16 matrix products and weights rounded beforehand."""
    model = copy.deepcopy(model)
    program = static_programs(model).programs["step"]
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)

    def reduced(*inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return program.function(*inputs)

    script = torch.jit.load(io.BytesIO(to_torchscript(*trace(model, replace(program, function=reduced)))))
    weights = {weight_attribute(name): value.detach() for name, value in model.named_parameters()}
    for attribute, _ in list(script.named_buffers()):
        setattr(script, attribute, weights[attribute])
    frozen = torch.jit.freeze(script.eval())
    return _over_arrays(frozen, program)


def _over_arrays(module: Callable[..., Sequence[Tensor]], program: Program) -> Step:
    def step(arrays: Arrays) -> Any:
        with torch.inference_mode():
            outputs = module(*(torch.from_numpy(arrays[spec.name]) for spec in program.inputs))
        return {spec.name: value.numpy() for spec, value in zip(program.outputs, outputs, strict=True)}

    return step


if __name__ == "__main__":
    main()
