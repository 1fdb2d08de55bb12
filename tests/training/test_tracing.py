"""One graph per program: as TorchScript and as ONNX it computes what the eager program computes, at every size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from models.architecture import Architecture, DirectArchitecture, InferenceArchitecture, IterativeArchitecture, VAEArchitecture
from models.artifact import WEIGHTS
from models.catalogue import LatentModel, build
from models.programs import static_programs
from training.export_files import run_onnx, run_torchscript, write_programs
from training.tracing import example_inputs, safetensors_offsets, trace

X, D, HIDDEN = 20, 3, (16,)
SIZES = [(1, 1), (1, 5), (2, 1), (3, 4), (7, 2)]

CASES: dict[str, tuple[str, InferenceArchitecture]] = {
    "iterative": ("bernoulli", IterativeArchitecture(("x", "grad_layer_norm", "grad_log_sign", "q"), (16, 16))),
    "everything": (
        "gaussian",
        IterativeArchitecture(
            ("x", "grad_raw", "error_x", "error_z", "q_layer_norm", "step", "previous_grad"), (16, 16), highway=True, recurrent=True
        ),
    ),
    "direct": ("bernoulli", DirectArchitecture(HIDDEN, encode_mask=True)),
    "quantised": ("quantised_gaussian", IterativeArchitecture(hidden=HIDDEN)),
}
FAST = ("step", "score")
"""Converting a program takes seconds: the quick run has two of one model, the slow one all of all."""


class Written:
    """Programs of a small model, eager and on disk in both formats."""

    def __init__(self, folder: Path, likelihood: str, inference: InferenceArchitecture, names: Sequence[str] = ()):
        self.folder = folder
        self.model: LatentModel = build(Architecture(VAEArchitecture(X, D, HIDDEN, likelihood), inference), seed=0).requires_grad_(False)
        heads = getattr(self.model.inference, "heads", None)
        if heads is not None:
            torch.nn.init.normal_(heads.weight, std=0.3, generator=torch.Generator().manual_seed(1))
        served = static_programs(self.model)
        self.served = replace(served, programs={name: served.programs[name] for name in names or served.programs})
        write_programs(folder, self.model, self.served.programs)


@pytest.fixture(
    scope="module",
    params=["quick", *(pytest.param(name, marks=pytest.mark.slow) for name in CASES)],
)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp(request.param)
    return Written(folder, *CASES["iterative"], FAST) if request.param == "quick" else Written(folder, *CASES[request.param])


def arrays(written: Written, name: str, rows: int, samples: int) -> list[np.ndarray[Any, Any]]:
    """Random inputs; 0/1 where the program wants observations."""
    generator = torch.Generator().manual_seed(rows * 100 + samples)
    values = []
    for spec in written.served.programs[name].inputs:
        shape = [{"rows": rows, "samples": samples}.get(str(size), size) for size in spec.shape]
        value = torch.randn([int(size) for size in shape], generator=generator)
        value = (value > -0.3).float() if spec.name in ("x", "mask") else value.abs() if spec.name == "memory.step" else value
        values.append(value.numpy())
    return values


@pytest.mark.parametrize("kind", ["torchscript", "onnx"])
def test_every_program_equals_the_eager_one_at_every_size(kind: str, written: Written) -> None:
    weights = dict(written.model.named_parameters())
    for name, program in written.served.programs.items():
        for rows, samples in SIZES:
            given = arrays(written, name, rows, samples)
            if kind == "onnx":
                outputs = run_onnx(written.folder / f"{name}.onnx", given)
            else:
                outputs = run_torchscript(written.folder / f"{name}.pt", weights, given)
            expected = program.function(*map(torch.from_numpy, given))
            assert len(outputs) == len(expected)
            for spec, value, reference in zip(program.outputs, outputs, expected, strict=True):
                where = f"{kind} {name} {spec.name} rows {rows} samples {samples}"
                assert_close(torch.from_numpy(value), reference, atol=1e-4, rtol=1e-4, msg=lambda text, where=where: f"{where}: {text}")


def test_the_graph_of_a_step_needs_no_autograd(written: Written) -> None:
    if "step" not in written.served.programs:
        return
    graph, used = trace(written.model, written.served.programs["step"])
    targets = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert all(target.startswith("aten.") or "getitem" in target or "built-in" in target for target in targets), targets
    assert set(used) <= {name for name, _ in written.model.named_parameters()}


def test_weights_are_written_once_and_referred_to(written: Written) -> None:
    offsets = safetensors_offsets(written.folder / WEIGHTS)
    assert set(offsets) == {name for name, _ in written.model.named_parameters()}
    for name in written.served.programs:
        proto = onnx.load(str(written.folder / f"{name}.onnx"), load_external_data=False)
        outside = [tensor for tensor in proto.graph.initializer if tensor.external_data]
        inside = [tensor for tensor in proto.graph.initializer if not tensor.external_data]
        assert all(np.prod(tensor.dims) <= 8 for tensor in inside), f"{name}: {[tensor.name for tensor in inside]}"
        for tensor in outside:
            entry = {item.key: item.value for item in tensor.external_data}
            assert entry["location"] == WEIGHTS
            assert (int(entry["offset"]), int(entry["length"])) in offsets.values()
            assert not tensor.raw_data
        script = torch.jit.load(str(written.folder / f"{name}.pt"))
        assert all(buffer.numel() == 0 for _, buffer in script.named_buffers())
        assert not list(script.named_parameters())


def test_an_onnx_file_names_no_place_of_the_exporting_machine(written: Written) -> None:
    for name in written.served.programs:
        assert str(Path(__file__).parents[2]).encode() not in (written.folder / f"{name}.onnx").read_bytes()


def test_offsets_point_at_the_bytes_of_each_tensor(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([7.0])}
    save_file(tensors, tmp_path / WEIGHTS)
    raw = (tmp_path / WEIGHTS).read_bytes()
    for name, (first, count) in safetensors_offsets(tmp_path / WEIGHTS).items():
        assert raw[first : first + count] == tensors[name].numpy().tobytes()


def test_example_inputs_have_distinct_sizes_above_one() -> None:
    model = build(Architecture(VAEArchitecture(X, D, HIDDEN), DirectArchitecture(HIDDEN)))
    *_, mu, _, noise = example_inputs(static_programs(model).programs["score"])
    rows, samples, size = noise.shape
    assert mu.shape == (rows, D)
    assert size == D
    assert len({1, rows, samples}) == 3
