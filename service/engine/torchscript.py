"""Programs as TorchScript, run by libtorch on the CPU. Only the files `torch*.py` beside this one import torch.

A stored module holds no weights: its empty buffers are called `weight__` and the weight's name in weights.safetensors, with
`__` for every dot. They are filled here, moved to the device and only then frozen, so that each weight is loaded once and
no device is baked into the file.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from models.artifact import WEIGHTS, Arrays, Artifact, ArtifactError, ProgramSpec
from service.engine.base import HostRows
from service.engine.parity import verify_parity

FORMAT = "torchscript"
WEIGHT_PREFIX = "weight__"
_LOAD = threading.Lock()
"""`torch.jit.load` is not thread-safe."""


class TorchScriptEngine(HostRows):
    """An artifact's TorchScript programs, with rows in host memory; tensors are views of numpy arrays.

    Args:
        artifact: verified; every program of its card must have a TorchScript file.
        threads: threads per operator; a setting of the whole process.

    Raises:
        ArtifactError: a file cannot be loaded, does not fit the weights, or fails the parity check.
    """

    def __init__(self, artifact: Artifact, threads: int = 1):
        self.name, self.card, self.begin = FORMAT, artifact.card, artifact.begin()
        torch.set_num_threads(threads)
        self._modules = load_programs(artifact, torch.device("cpu"))
        self._inputs = {
            program: [(tensor.name, np.dtype(tensor.dtype)) for tensor in spec.inputs] for program, spec in artifact.card.programs.items()
        }
        self._outputs = {program: [tensor.name for tensor in spec.outputs] for program, spec in artifact.card.programs.items()}
        self.parity = verify_parity(self, artifact)

    def run(self, program: str, arrays: Mapping[str, NDArray[Any]]) -> Arrays:
        inputs = [torch.from_numpy(np.ascontiguousarray(arrays[name], dtype)) for name, dtype in self._inputs[program]]
        with torch.inference_mode():
            outputs = self._modules[program](*inputs)
        if isinstance(outputs, torch.Tensor):
            outputs = (outputs,)
        return {name: value.numpy() for name, value in zip(self._outputs[program], outputs, strict=True)}

    def close(self) -> None:
        self._modules.clear()


def load_programs(artifact: Artifact, device: torch.device) -> dict[str, torch.jit.ScriptModule]:
    """Every program of the card, with its weights on `device`, frozen there.

    Raises:
        ArtifactError: a file is missing, cannot be loaded or does not fit the weights.
    """
    weights = load_file(str(artifact.file(WEIGHTS)), device=str(device))
    by_attribute = {WEIGHT_PREFIX + name.replace(".", "__"): value for name, value in weights.items()}
    return {program: _load(artifact, program, spec, by_attribute, device) for program, spec in artifact.card.programs.items()}


def _load(
    artifact: Artifact, program: str, spec: ProgramSpec, weights: Mapping[str, torch.Tensor], device: torch.device
) -> torch.jit.ScriptModule:
    if FORMAT not in spec.files:
        raise ArtifactError(f"{artifact.path}: program {program!r} has no TorchScript file; it has {sorted(spec.files) or 'none'}")
    file = artifact.file(spec.files[FORMAT])
    with _LOAD, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript as a whole
        try:
            module: torch.jit.ScriptModule = torch.jit.load(str(file), map_location=device)
        except RuntimeError as exc:
            raise ArtifactError(f"{file}: TorchScript cannot load it: {exc}") from exc
        for attribute, _ in list(module.named_buffers()):
            if attribute not in weights:
                raise ArtifactError(f"{file}: wants the weight {attribute!r}, which {WEIGHTS} does not hold")
            setattr(module, attribute, weights[attribute])
        if device.type != "cpu":
            place_factories(module, device)
        return torch.jit.freeze(module.eval())


def place_factories(module: torch.jit.ScriptModule, device: torch.device) -> None:
    """Makes `full`, which a program calls without naming a device, fill arrays on `device` and not on the CPU.

    Scalars stay where they are: they enter a kernel as an argument.
    """
    graph: Any = module.graph  # its stubs know half of it
    for node in graph.findAllNodes("aten::full"):
        size, _, _, _, place, _ = node.inputs()
        made = size.node()
        scalar = made.kind() == "prim::ListConstruct" and not list(made.inputs())
        if scalar or size.toIValue() == [] or place.toIValue() is not None:
            continue
        with graph.insert_point_guard(node):
            node.replaceInput(4, graph.insertConstant(device))
