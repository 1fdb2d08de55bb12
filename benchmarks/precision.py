"""What reduced precision costs and brings on this CPU: nats, µs of one refinement step by batch, and whether a row sees its neighbours.

    python benchmarks/precision.py [--artifact checkpoints/mnist-iterative/1] [--data FOLDER] [--rows 1000] [--seconds 3]

The package must be installed with its `train` extra (`make bench` does); the data set is found as by `elbow-train`
(ELBOW_DATA, or --data). `init` and `step` of the shipped model in several forms, one thread, batches in turn, medians of `step`
(_timing.py):

- float32: as served by default;
- int8 by row: what `elbow-train quantise` writes and ELBOW_PRECISION=int8 serves: a scale per row and per column (training/quantise.py);
- int8 by array: onnxruntime.quantization.quantize_dynamic: one scale for all rows of a batch;
- int8 static: one scale per product, the largest magnitude that 500 training rows had in it over the trained steps;
- int8 by block: ONNX Runtime's MatMulNBits, weights and activations in blocks of 32, products summed in float32;
- float32 ts: the artifact's programs as TorchScript, which bf16 has to be compared with;
- bf16 ts: `step` traced again with its weights rounded and its matrix products in bfloat16 (oneDNN; avx512_bf16 where the CPU
  has it), all else in float32; `init` as it is.

Nats: the mean ELBO of validation images after the trained number of steps, with the same noise for all, measured in float32 by
20 fresh samples per image. Cost: against float32; its standard error is that of the difference per image. Neighbours: the largest
|a − b| / max(1, |b|) between rows of one `step` in a batch of 64 and the same rows alone; the service allows 1e-5.
"""

from __future__ import annotations

import argparse
import copy
import io
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from _model import eager_model
from _report import artifact_name, keep, table
from _timing import time_in_turn
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn

from models.artifact import Arrays, Artifact, Card, parity_error
from models.catalogue import LatentModel
from models.programs import Program, static_programs
from service.engine.torchscript import TorchScriptEngine
from training.data.binarise import observe
from training.data.catalogue import load
from training.precision import CHOOSING, Runner, nats, runners_of
from training.quantise import LARGEST, RUNTIME, Activations, Int8Graph, to_int8
from training.step import fresh_noise
from training.tracing import to_torchscript, trace, weight_attribute

ARTIFACT = Path(__file__).parents[1] / "checkpoints" / "mnist-iterative" / "1"
SAMPLES = 20
BLOCK = 32
CALIBRATION_ROWS = 500
NEIGHBOURS = 64

Form = dict[str, Runner]
"""init and step."""


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
    card, model = artifact.card, eager_model(artifact)
    images = load(card.provenance["run"]["data"]["name"], args.data)
    observed = {
        split: observe(torch.as_tensor(getattr(images, split)[:rows]), images.kind, card.likelihood.name, torch.Generator().manual_seed(1))
        for split, rows in (("train", CALIBRATION_ROWS), ("valid", args.rows))
    }
    x = observed["valid"]
    with tempfile.TemporaryDirectory() as folder:
        forms = forms_of(artifact, model, observed["train"], Path(folder))
    values = {name: nats(card, form, model, x, SAMPLES) for name, form in forms.items()}
    seen = {name: neighbours(card, forms["float32"], form, x[:NEIGHBOURS]) for name, form in forms.items()}
    times = {batch: measure(card, forms, x[:batch], args.seconds) for batch in args.batches}
    rows = []
    for name, value in values.items():
        cost = (values["float32"] - value).double()
        row = {"step": name, "nats": float(value.double().mean()), "cost": float(cost.mean()), "±": float(cost.std() / len(cost) ** 0.5)}
        row["neighbours"] = seen[name]
        rows.append(row | {f"µs, batch {batch}": times[batch][name] for batch in args.batches})
    # three digits hide what precision costs
    shown = [{**row, "nats": f"{row['nats']:.3f}", "cost": f"{row['cost']:.4f}", "±": f"{row['±']:.4f}"} for row in rows]
    print(f"{artifact_name(args.artifact)}: {len(x)} rows, {card.trained_steps} steps, {SAMPLES} samples; one thread")
    print(table(list(shown[0]), [list(row.values()) for row in shown]))
    if args.keep:
        print(f"\nkept in {keep(args.keep, {'artifact': artifact_name(args.artifact), 'rows': len(x), 'samples': SAMPLES, 'steps': rows})}")


def forms_of(artifact: Artifact, model: LatentModel, train: Tensor, folder: Path) -> dict[str, Form]:
    """Everything that is compared. `folder`: for the ONNX files."""
    card = artifact.card
    shutil.copytree(artifact.path, folder, dirs_exist_ok=True)
    files = {program: card.programs[program].files["onnx"] for program in CHOOSING}

    def rewritten(name: str, rewrite: Callable[[str, Any], object]) -> Form:
        made = {}
        for program, file in files.items():
            proto = onnx.load(str(folder / file), load_external_data=False)
            rewrite(program, proto)
            made[program] = f"{program}.{name}.onnx"
            onnx.save(proto, str(folder / made[program]))
        return runners_of(folder, card, made)

    largest = calibrated(folder, card, files, train)
    script = TorchScriptEngine(artifact, threads=1)
    torchscript: Form = {program: partial(script.run, program) for program in CHOOSING}
    return {
        "float32": runners_of(folder, card, files),
        "int8 by row": rewritten("row", lambda _, proto: to_int8(proto)),
        "int8 by array": runners_of(folder, card, {program: by_array(folder, program, file) for program, file in files.items()}),
        "int8 static": rewritten("static", lambda program, proto: to_int8(proto, static(largest[program]))),
        "int8 by block": rewritten("block", lambda _, proto: to_blocks(proto, artifact.weights())),
        "float32 ts": torchscript,
        "bf16 ts": torchscript | {"step": bfloat16_step(model)},
    }


def neighbours(card: Card, exact: Form, form: Form, x: Tensor) -> float:
    """How much a row of one step changes with who shares its batch."""
    arrays = _ready(card, exact, x)
    together = form["step"](arrays)
    alone = [form["step"]({name: value[row : row + 1] for name, value in arrays.items()}) for row in range(len(x))]
    return max(parity_error(np.concatenate([each[name] for each in alone]), value) for name, value in together.items())


def measure(card: Card, forms: Mapping[str, Form], x: Tensor, seconds: float) -> dict[str, float]:
    """Median µs of each form's step at x's batch."""
    arrays = _ready(card, forms["float32"], x)
    return time_in_turn({name: partial(form["step"], arrays) for name, form in forms.items()}, seconds)


def _ready(card: Card, form: Form, x: Tensor) -> Arrays:
    """What `step` takes after one step."""
    arrays: Arrays = {"x": x.numpy(), "mask": np.ones_like(x.numpy())}
    arrays |= form["init"](arrays)
    for seed in (4, 5):
        if seed == 5:
            arrays |= form["step"](arrays)
        arrays |= _noise(card, len(x), torch.Generator().manual_seed(seed))
    return {tensor.name: arrays[tensor.name] for tensor in card.programs["step"].inputs}


def _noise(card: Card, rows: int, generator: torch.Generator) -> Arrays:
    sizes = tuple(level.size for level in card.levels)
    noise = fresh_noise(sizes, rows, card.samples, card.antithetic, torch.device("cpu"), generator)
    return {f"noise{level}": part.numpy() for level, part in enumerate(noise)}


def by_array(folder: Path, program: str, file: str) -> str:
    """The file of a program quantised by ONNX Runtime's own tool."""
    proto = onnx.load(str(folder / file))
    _fold_transposes(proto)
    plain, made = folder / f"{program}.plain.onnx", f"{program}.array.onnx"
    onnx.save(proto, str(plain))
    quantize_dynamic(plain, folder / made, per_channel=True, weight_type=QuantType.QInt8)
    left = [node.name for node in onnx.load(str(folder / made)).graph.node if node.op_type in ("MatMul", "Gemm")]
    if left:
        raise SystemExit(f"int8: {len(left)} matrix products were left in float32: {left}")
    return made


def _fold_transposes(proto: Any) -> None:
    """Weights that the graph turns around become weights of their own: only these can be quantised by that tool."""
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


def calibrated(folder: Path, card: Card, files: Mapping[str, str], x: Tensor) -> dict[str, dict[str, float]]:
    """By program: the largest magnitude of every product's left side, over the trained steps."""
    import onnxruntime

    largest: dict[str, dict[str, float]] = {}
    sessions, lefts = {}, {}
    for program, file in files.items():
        proto = onnx.load(str(folder / file), load_external_data=False)
        lefts[program] = list(dict.fromkeys(node.input[0] for node in proto.graph.node if node.op_type in ("Gemm", "MatMul")))
        for name in lefts[program]:
            proto.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
        onnx.save(proto, str(folder / f"{program}.seen.onnx"))
        sessions[program] = onnxruntime.InferenceSession(str(folder / f"{program}.seen.onnx"), providers=["CPUExecutionProvider"])

    def run(program: str, arrays: Arrays) -> Arrays:
        spec, session = card.programs[program], sessions[program]
        names = [node.name for node in session.get_inputs()]
        values = session.run(None, {name: arrays[given.name] for name, given in zip(names, spec.inputs, strict=True)})
        found = largest.setdefault(program, {})
        for name, value in zip(lefts[program], values[len(spec.outputs) :], strict=True):
            found[name] = max(found.get(name, 0.0), float(np.abs(value).max()))
        return dict(zip((output.name for output in spec.outputs), values, strict=False))

    arrays: Arrays = {"x": x.numpy(), "mask": np.ones_like(x.numpy())}
    arrays |= run("init", arrays)
    generator = torch.Generator().manual_seed(6)
    for _ in range(card.trained_steps):
        arrays |= _noise(card, len(x), generator)
        arrays |= run("step", arrays)
    return largest


def static(largest: Mapping[str, float]) -> Activations:
    """Scales that are constants of the graph."""

    def activations(graph: Int8Graph, name: str) -> tuple[str, str]:
        scale = graph.constant(f"largest_{name}", np.float32(largest[name]))
        unit, zero = graph.constant("unit", np.float32(1 / LARGEST)), graph.constant("zero", np.uint8(128))
        return graph.add("QuantizeLinear", graph.add("Div", name, scale), unit, zero), scale

    return activations


def to_blocks(proto: Any, weights: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Every product as one MatMulNBits of 8 bits, whose activations are quantised row by row and block by block."""
    values = {weight_attribute(name): value for name, value in weights.items()}
    done: set[str] = set()
    for i, node in enumerate(proto.graph.node):
        if node.op_type == "Transpose" and node.input[0] in values:
            values[node.output[0]] = values[node.input[0]].T
        if node.op_type not in ("Gemm", "MatMul"):
            continue
        left, right, *bias = node.input
        turned = np.ascontiguousarray(values[right].T)
        size, width = turned.shape
        blocks = -(-width // BLOCK)
        padded = np.zeros((size, blocks * BLOCK), np.float32)
        padded[:, :width] = turned
        padded = padded.reshape(size, blocks, BLOCK)
        scale = np.maximum(np.abs(padded).max(2) / LARGEST, 1e-30)
        if right not in done:
            done.add(right)
            rounded = (np.round(padded / scale[:, :, None]) + 128).astype(np.uint8)
            proto.graph.initializer.append(numpy_helper.from_array(rounded, f"{right}_q"))
            proto.graph.initializer.append(numpy_helper.from_array(scale.reshape(-1).astype(np.float32), f"{right}_s"))
        inputs = [left, f"{right}_q", f"{right}_s", *(["", "", *bias] if bias else [])]
        attributes = {"K": width, "N": size, "bits": 8, "block_size": BLOCK, "accuracy_level": 4}
        proto.graph.node[i].CopyFrom(helper.make_node("MatMulNBits", inputs, list(node.output), domain=RUNTIME, **attributes))
    proto.opset_import.append(helper.make_opsetid(RUNTIME, 1))


def bfloat16_step(model: LatentModel) -> Runner:
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


def _over_arrays(module: Callable[..., Sequence[Tensor]], program: Program) -> Runner:
    def step(arrays: Arrays) -> Any:
        with torch.inference_mode():
            outputs = module(*(torch.from_numpy(arrays[spec.name]) for spec in program.inputs))
        return {spec.name: value.numpy() for spec, value in zip(program.outputs, outputs, strict=True)}

    return step


if __name__ == "__main__":
    main()
