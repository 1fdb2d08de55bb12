"""checkpoint -> artifact: programs as TorchScript and ONNX, reference outputs, measured curve, quantiles, provenance.

What ships is checked here the way an engine will check it: both formats are loaded again and compared with the float64
eager model on real rows, and an artifact that disagrees is not written.
"""

from __future__ import annotations

import copy
import io
import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.artifact import (
    WEIGHTS,
    Arrays,
    Card,
    Curve,
    LevelSpec,
    LikelihoodSpec,
    ProgramSpec,
    Quantiles,
    Signer,
    XSpec,
    parity_error,
    write_card,
    write_reference,
)
from models.catalogue import LatentModel
from models.likelihood import LIKELIHOODS
from models.programs import Program, StaticPrograms, level_names, static_programs
from training.checkpoint import load_static
from training.config import RunConfig
from training.data.binarise import observe
from training.data.catalogue import load
from training.data.images import Images
from training.evaluate import BINARISE_SEED, CURVE_STEPS, Evaluator
from training.run_loop import machine
from training.tracing import safetensors_offsets, to_onnx, to_torchscript, trace, weight_attribute

MAX_STEPS = 128
PARITY = 1e-4
PROBABILITIES = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)
REFERENCE_ROWS, REFERENCE_SAMPLES = 4, 2


class ExportError(Exception):
    """An exported program does not compute what the model computes."""


def export(
    checkpoint: Path,
    repository: Path,
    name: str,
    version: str,
    *,
    rows: int = 5000,
    samples: int = 20,
    data_root: str | None = None,
    signer: Signer | None = None,
    quiet: bool = False,
) -> Path:
    """Writes <repository>/<name>/<version>/ and returns it.

    Args:
        rows, samples: of the validation curve and of the training quantiles.

    Raises:
        ExportError: a program's TorchScript or ONNX form disagrees with the float64 model.
        FileExistsError: that version is there already: versions never change.
    """
    target = repository / name / version
    if target.exists():
        raise FileExistsError(f"{target} exists, and a version never changes: choose another --version")
    model, run, facts = load_static(checkpoint)
    images = load(run.data.name, data_root)
    partial = target.with_name(f".{version}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        served = static_programs(model)
        _write_programs(partial, model, served)
        reference = _reference(model, observe(torch.as_tensor(images.valid[:REFERENCE_ROWS]), images.kind, _generator(BINARISE_SEED)))
        write_reference(partial, reference)
        check_parity(partial, served, reference)
        evaluation = checkpoint / "evaluation.json"
        metrics = json.loads(evaluation.read_text()) if evaluation.exists() else {}
        likelihood = run.architecture.generative.likelihood
        card = Card(
            name=name,
            version=version,
            family="static",
            description=f"{run.architecture.inference.kind} inference, {run.name}, trained on {run.data.name}",
            x=_describe_x(model, run, images),
            likelihood=LikelihoodSpec(name=likelihood, parameters=LIKELIHOODS[likelihood].HEADS),
            levels=tuple(LevelSpec(name=f"q{i}", size=d, parameters=level_names(i)) for i, d in enumerate(model.generative.latent_sizes)),
            carry=served.carry,
            context=served.context,
            encoding=model.inference.encodings,
            trained_steps=run.refinement.steps if model.inference.refines else 0,
            max_steps=MAX_STEPS if model.inference.refines else 0,
            samples=run.refinement.samples,
            antithetic=run.refinement.antithetic,
            programs={name: _spec(name, program) for name, program in served.programs.items()},
            **_measure(model, run, images, rows, samples, quiet),
            metrics={key: float(metrics[key]) for key in ("log_px", "optimum", "seed_spread") if key in metrics},
            provenance=_provenance(run, facts, images),
        )
        write_card(partial, card, signer)
    except BaseException:
        # a half-written version is of no use to anyone
        shutil.rmtree(partial, ignore_errors=True)
        raise
    partial.rename(target)
    return target


def _spec(name: str, program: Program) -> ProgramSpec:
    return ProgramSpec(inputs=program.inputs, outputs=program.outputs, files={"onnx": f"{name}.onnx", "torchscript": f"{name}.pt"})


def _describe_x(model: LatentModel, run: RunConfig, images: Images) -> XSpec:
    binary = run.architecture.generative.likelihood == "bernoulli"
    return XSpec(
        shape=(model.generative.x_size,),
        minimum=0.0 if binary else None,
        maximum=1.0 if binary else None,
        units="nats per image",
        description=f"{images.shape[0]}×{images.shape[1]} pixels, row by row"
        + ("; 0 or 1, exact for binary data; grey values in [0, 1] count as cross-entropy" if binary else ""),
    )


def _write_programs(folder: Path, model: LatentModel, served: StaticPrograms) -> None:
    save_file({name: value.detach().contiguous() for name, value in model.named_parameters()}, folder / WEIGHTS)
    offsets = safetensors_offsets(folder / WEIGHTS)
    for name, program in served.programs.items():
        graph, used = trace(model, program)
        (folder / f"{name}.pt").write_bytes(to_torchscript(graph, used))
        (folder / f"{name}.onnx").write_bytes(to_onnx(graph, used, model, program, offsets))


def _reference(model: LatentModel, x: Tensor) -> dict[str, tuple[Arrays, Arrays]]:
    """Inputs and float64 outputs of every program, on real rows: the first is half hidden, λ is that of a few steps on."""
    programs = static_programs(copy.deepcopy(model).double()).programs
    generator = _generator(7)
    mask = torch.ones_like(x)
    mask[0, : x.shape[1] // 2] = 0
    known: dict[str, Tensor] = {"x": x.double(), "mask": mask.double()}
    reference: dict[str, tuple[Arrays, Arrays]] = {}
    # each program's outputs are inputs of later ones, so λ, z and the likelihood's parameters are real ones
    order = ["init", *["step"] * 3 * ("step" in programs), "score", "prior_sample", "posterior_sample", "decode", "sample_x"]
    for name in order:
        program = programs[name]
        inputs = []
        for spec in program.inputs:
            if spec.name.startswith("noise"):
                sizes = [{"rows": REFERENCE_ROWS, "samples": REFERENCE_SAMPLES}.get(str(size), size) for size in spec.shape]
                value = torch.randn([int(size) for size in sizes], generator=generator, dtype=torch.float64)
            else:
                value = known[spec.name]
            # engines read float32: the reference must start from the same numbers
            inputs.append(value.float().double())
        with torch.no_grad():
            outputs = program.function(*inputs)
        known |= {spec.name: value for spec, value in zip(program.outputs, outputs, strict=True) if spec.name not in ("x",)}
        reference[name] = (
            {spec.name: value.float().numpy() for spec, value in zip(program.inputs, inputs, strict=True)},
            {spec.name: value.numpy() for spec, value in zip(program.outputs, outputs, strict=True)},
        )
    return reference


def check_parity(folder: Path, served: StaticPrograms, reference: Mapping[str, tuple[Arrays, Arrays]]) -> dict[str, float]:
    """The worst error of each format over all programs.

    Raises:
        ExportError: one is above 1e-4.
    """
    from safetensors.torch import load_file

    weights = load_file(folder / WEIGHTS)
    worst = {"torchscript": 0.0, "onnx": 0.0}
    for name, program in served.programs.items():
        inputs, outputs = reference[name]
        arrays = [inputs[spec.name] for spec in program.inputs]
        for kind, values in (
            ("torchscript", _run_torchscript(folder / f"{name}.pt", weights, arrays)),
            ("onnx", _run_onnx(folder / f"{name}.onnx", arrays)),
        ):
            for spec, value in zip(program.outputs, values, strict=True):
                error = parity_error(value, outputs[spec.name])
                if error > PARITY:
                    raise ExportError(f"{kind} {name}: output {spec.name} differs from the float64 model by {error:.1e} (limit {PARITY})")
                worst[kind] = max(worst[kind], error)
    return worst


def _run_torchscript(file: Path, weights: Mapping[str, Tensor], arrays: list[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    module = torch.jit.load(io.BytesIO(file.read_bytes()))
    by_attribute = {weight_attribute(name): value for name, value in weights.items()}
    for attribute, _ in list(module.named_buffers()):
        setattr(module, attribute, by_attribute[attribute])
    with torch.inference_mode():
        outputs = module(*(torch.from_numpy(array) for array in arrays))
    return [output.numpy() for output in (outputs if isinstance(outputs, tuple | list) else (outputs,))]


def _run_onnx(file: Path, arrays: list[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    import os

    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session.run(None, {node.name: array for node, array in zip(session.get_inputs(), arrays, strict=True)})


def _measure(model: LatentModel, run: RunConfig, images: Images, rows: int, samples: int, quiet: bool) -> dict[str, Any]:
    """The validation curve and the training quantiles."""
    measured = {}
    for split in ("valid", "train"):
        x = observe(torch.as_tensor(getattr(images, split)[:rows]), images.kind, _generator(BINARISE_SEED))
        evaluator = Evaluator(model, run, x, quiet=quiet)
        steps = list(CURVE_STEPS) if evaluator.refines else [0]
        measured[split] = evaluator.curve(rows, samples, steps)
    valid, train = measured["valid"], measured["train"]
    quantiles = torch.quantile(train.double(), torch.tensor(PROBABILITIES, dtype=torch.float64), dim=0).T
    return {
        "curve": Curve(
            steps=tuple(steps), elbo=tuple(valid.mean(0).tolist()), elbo_std=tuple(valid.std(0).tolist()), rows=len(valid), samples=samples
        ),
        "quantiles": Quantiles(probabilities=PROBABILITIES, steps=tuple(steps), elbo=tuple(tuple(row) for row in quantiles.tolist())),
    }


def _provenance(run: RunConfig, facts: Mapping[str, Any], images: Images) -> dict[str, Any]:
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "commit": commit or "unknown",
        "seed": run.seed,
        "run": run.to_dict(),
        "epoch": facts.get("epoch"),
        "data": {"name": images.name, "sha256": images.sha256},
        "libraries": machine(),
    }


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


