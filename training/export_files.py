"""Programs as files: TorchScript and ONNX beside the weights, and the proof that both compute what the model computes."""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.artifact import NAME_PATTERN, WEIGHTS, Arrays, Artifact, ProgramSpec, parity_error
from models.catalogue import FilterModel, LatentModel
from models.programs import Program
from training.tracing import safetensors_offsets, to_onnx, to_torchscript, trace, weight_attribute

PARITY = 1e-4
PROBABILITIES = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)
REFERENCE_ROWS, REFERENCE_SAMPLES = 4, 2


@dataclass(frozen=True)
class Description:
    """What a family knows of a model that is exported.

    Attributes:
        programs: by name. constants: kept beside the weights. card: the card's fields that depend on the family.
        reference: program -> (inputs, float64 outputs), on real rows. data: name and sha256.
    """

    programs: Mapping[str, Program]
    constants: Mapping[str, Tensor]
    reference: dict[str, tuple[Arrays, Arrays]]
    card: dict[str, Any]
    data: tuple[str, str]


class ExportError(Exception):
    """An exported program does not compute what the model computes."""


def check_version(repository: Path, name: str, version: str) -> Path:
    """The folder that a version will have.

    Raises:
        ExportError: name or version is not one that a card may have. FileExistsError: that version is there already.
    """
    for option, value in (("--name", name), ("--version", version)):
        if not re.fullmatch(NAME_PATTERN, value):
            raise ExportError(f"{option} {value!r}: letters, digits, '.', '_' and '-', beginning with a letter or digit, at most 64")
    target = repository / name / version
    if target.exists():
        raise FileExistsError(f"{target} exists, and a version never changes: choose another version or repository")
    return target


@contextmanager
def new_version(repository: Path, name: str, version: str) -> Iterator[tuple[Path, Path]]:
    """A version's folder, written whole or not at all: gives (where to write, what it will be called at the end). If it fails, no folder
    that it made is left.

    Raises:
        ExportError, FileExistsError: as `check_version`.
    """
    target = check_version(repository, name, version)
    partial = target.with_name(f".{version}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    made = [folder for folder in partial.parents if not folder.exists()]
    try:
        partial.mkdir(parents=True)
        yield partial, target
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # another export may have put something there
            for folder in made:
                folder.rmdir()
        raise
    partial.rename(target)


def copy_files(artifact: Artifact, folder: Path) -> None:
    """Everything the card lists; the card itself is written anew."""
    for name in artifact.card.files:
        shutil.copyfile(artifact.file(name), folder / name)


def program_spec(name: str, program: Program) -> ProgramSpec:
    return ProgramSpec(inputs=program.inputs, outputs=program.outputs, files={"onnx": f"{name}.onnx", "torchscript": f"{name}.pt"})


def reference_run(program: Program, known: Mapping[str, Tensor], rows: int, generator: torch.Generator) -> tuple[Arrays, Arrays]:
    """One run of `program` in float64, as reference for the engines: its inputs as they are given (float32), and its outputs.

    Args:
        known: the inputs that are no noise, by name; noise is drawn, `REFERENCE_SAMPLES` per row.
    """
    inputs = []
    for spec in program.inputs:
        if spec.name.startswith("noise"):
            sizes = [{"rows": rows, "samples": REFERENCE_SAMPLES}.get(str(size), size) for size in spec.shape]
            value = torch.randn([int(size) for size in sizes], generator=generator, dtype=torch.float64)
        else:
            value = known[spec.name]
        # engines read float32: the reference must start from the same numbers
        inputs.append(value.float().double())
    with torch.no_grad():
        outputs = program.function(*inputs)
    return (
        {spec.name: value.float().numpy() for spec, value in zip(program.inputs, inputs, strict=True)},
        {spec.name: value.numpy() for spec, value in zip(program.outputs, outputs, strict=True)},
    )


def write_programs(
    folder: Path, model: LatentModel | FilterModel, programs: Mapping[str, Program], constants: Mapping[str, Tensor] | None = None
) -> None:
    """Writes weights.safetensors (with `constants` beside the parameters) and every program in both formats."""
    weights = {name: value.detach().contiguous() for name, value in model.named_parameters()}
    # clones: a filter's first state is itself a parameter, and no two arrays of the file may share memory
    save_file({**weights, **{name: value.clone() for name, value in (constants or {}).items()}}, folder / WEIGHTS)
    offsets = safetensors_offsets(folder / WEIGHTS)
    for name, program in programs.items():
        graph, used = trace(model, program)
        (folder / f"{name}.pt").write_bytes(to_torchscript(graph, used))
        (folder / f"{name}.onnx").write_bytes(to_onnx(graph, used, model, program, offsets))


def check_parity(folder: Path, programs: Mapping[str, Program], reference: Mapping[str, tuple[Arrays, Arrays]]) -> dict[str, float]:
    """The worst error of each format over all programs.

    Raises:
        ExportError: one is above 1e-4.
    """
    weights = load_file(folder / WEIGHTS)
    worst = {"torchscript": 0.0, "onnx": 0.0}
    for name, program in programs.items():
        inputs, outputs = reference[name]
        arrays = [inputs[spec.name] for spec in program.inputs]
        for kind, values in (
            ("torchscript", run_torchscript(folder / f"{name}.pt", weights, arrays)),
            ("onnx", run_onnx(folder / f"{name}.onnx", arrays)),
        ):
            for spec, value in zip(program.outputs, values, strict=True):
                error = parity_error(value, outputs[spec.name])
                if error > PARITY:
                    raise ExportError(f"{kind} {name}: output {spec.name} differs from the float64 model by {error:.1e} (limit {PARITY})")
                worst[kind] = max(worst[kind], error)
    return worst


def run_torchscript(file: Path, weights: Mapping[str, Tensor], arrays: list[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    module = torch.jit.load(io.BytesIO(file.read_bytes()))
    by_attribute = {weight_attribute(name): value for name, value in weights.items()}
    for attribute, _ in list(module.named_buffers()):
        setattr(module, attribute, by_attribute[attribute])
    with torch.inference_mode():
        outputs = module(*(torch.from_numpy(array) for array in arrays))
    return [output.numpy() for output in (outputs if isinstance(outputs, tuple | list) else (outputs,))]


def run_onnx(file: Path, arrays: list[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session.run(None, {node.name: array for node, array in zip(session.get_inputs(), arrays, strict=True)})
