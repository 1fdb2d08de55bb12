"""Programs of sequence models as TorchScript and as ONNX: the float64 model's numbers, at sizes other than the traced ones."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.artifact import WEIGHTS, Arrays, parity_error
from models.filter_programs import FRAME, FilterPrograms, filter_programs
from tests.models.small_filters import frames, small_filter
from training.export_files import PARITY, run_onnx, run_torchscript
from training.tracing import safetensors_offsets, to_onnx, to_torchscript, trace

ROWS, SAMPLES = 5, 2


def known_arrays(served: FilterPrograms, x: Tensor, mask: Tensor, steps: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Every program's inputs, those that other programs give included: two frames into a sequence."""
    latent = next(int(spec.shape[1]) for spec in served.carry)
    size = x.shape[-1]

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=x.dtype)

    known = {spec.name: served.begin[spec.name].expand(ROWS, -1) for spec in served.state}
    known |= {"noise_advance": noise(ROWS, SAMPLES, latent), "noise_x": noise(ROWS, SAMPLES, size)}
    order = ["predict", *[name for name in ("init", "step") if name in served.programs], "advance"]
    for t in range(2):
        known |= {"x": x[:, t], "mask": mask[:, t], "noise0": noise(ROWS, SAMPLES, latent)}
        for name in order:
            known |= outputs(served, name, known)
    return {name: value.float().double() for name, value in known.items()} | {
        "frame noise": noise(ROWS, steps, SAMPLES, latent).float().double()
    }


def outputs(served: FilterPrograms, name: str, known: dict[str, Tensor]) -> dict[str, Tensor]:
    program = served.programs[name]
    with torch.no_grad():
        values = program.function(*(known[spec.name] for spec in program.inputs))
    return {spec.name: value for spec, value in zip(program.outputs, values, strict=True)}


@pytest.mark.parametrize(
    ("generative", "inference", "names", "formats"),
    [
        ("linear gaussian 1-D", "kalman", ("init", FRAME), ("torchscript", "onnx")),
        ("vrnn", "avf with past", ("step",), ("torchscript", "onnx")),
        ("vrnn gru bernoulli", "own", ("predict", "init", FRAME), ("torchscript",)),
        ("vrnn", "own residual", ("init",), ("onnx",)),
        ("linear gaussian 1-D", "avf", ("step",), ("onnx",)),
        # these three also by the whole exports of test_export_filter.py
        pytest.param("srnn", "avf", ("predict", "advance", "sample_x", FRAME), ("torchscript",), marks=pytest.mark.slow),
        pytest.param("vrnn quantised", "avf", ("step",), ("torchscript",), marks=pytest.mark.slow),
        pytest.param("srnn", "avf", ("step",), ("onnx",), marks=pytest.mark.slow),
        pytest.param("linear gaussian", "kalman", ("init", "advance", FRAME), ("torchscript", "onnx"), marks=pytest.mark.slow),
        pytest.param("linear gaussian", "avf", ("step", "advance"), ("torchscript",), marks=pytest.mark.slow),
        pytest.param("vrnn", "avf with past", (FRAME,), ("torchscript", "onnx"), marks=pytest.mark.slow),
        pytest.param("vrnn", "avf with x", ("step", FRAME), ("torchscript",), marks=pytest.mark.slow),
        pytest.param("vrnn", "avf with x", ("predict", "step", "advance", FRAME), ("onnx",), marks=pytest.mark.slow),
        pytest.param("vrnn quantised", "avf", ("step", "advance", FRAME), ("onnx",), marks=pytest.mark.slow),
        pytest.param("linear gaussian", "avf", ("predict", "advance", FRAME), ("onnx",), marks=pytest.mark.slow),
        pytest.param("srnn", "adam", ("step", FRAME), ("torchscript", "onnx"), marks=pytest.mark.slow),
    ],
)
def test_a_traced_program_agrees_with_the_float64_model(
    generative: str, inference: str, names: tuple[str, ...], formats: tuple[str, ...], tmp_path: Path, generator: torch.Generator
) -> None:
    steps = 1
    exact = small_filter(generative, inference)
    model = copy.deepcopy(exact).float()
    served, reference = filter_programs(model, steps), filter_programs(exact, steps)
    x, mask = frames(exact.generative, ROWS, 2, generator)
    known = known_arrays(reference, x, mask, steps, generator)
    weights = {name: value.detach().contiguous() for name, value in model.named_parameters()}
    save_file(weights, tmp_path / WEIGHTS)
    offsets = safetensors_offsets(tmp_path / WEIGHTS)
    for name in names:
        program = served.programs[name]
        inputs = known | ({"noise0": known["frame noise"]} if name == FRAME else {})
        expected = outputs(reference, name, inputs)
        graph, used = trace(model, program)
        arrays = [inputs[spec.name].float().numpy() for spec in program.inputs]
        for kind in formats:
            if kind == "torchscript":
                (tmp_path / f"{name}.pt").write_bytes(to_torchscript(graph, used))
                values = run_torchscript(tmp_path / f"{name}.pt", weights, arrays)
            else:
                (tmp_path / f"{name}.onnx").write_bytes(to_onnx(graph, used, model, program, offsets))
                values = run_onnx(tmp_path / f"{name}.onnx", arrays)
            measured: Arrays = {spec.name: value for spec, value in zip(program.outputs, values, strict=True)}
            for output, value in expected.items():
                assert parity_error(measured[output], value.numpy()) < PARITY, f"{kind} {name}: {output}"
