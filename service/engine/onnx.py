"""Programs as ONNX graphs, run by ONNX Runtime on the CPU. The only file that imports onnxruntime."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.artifact import Arrays, Artifact, ArtifactError, ProgramSpec
from service.engine.base import HostRows
from service.engine.crew import Crew, Feeds, Returned
from service.engine.parity import reduced_programs, verify_parity, verify_precision

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before the import, which else writes a device id into the home folder

import onnxruntime as ort

FORMAT = "onnx"


class OnnxEngine(HostRows):
    """An artifact's ONNX programs, one session each, with rows in host memory.

    The graphs hold no weights: their initialisers point into weights.safetensors by offset, and are resolved because
    each graph is loaded from its file.

    Args:
        artifact: verified; every program of its card must have an ONNX file.
        threads: they share the rows of a call (service/engine/crew.py) and sleep between calls: the HTTP loop shares the cores.
        precision: one that the card offers.

    Raises:
        ArtifactError: a file cannot be loaded, does not fit the card, or fails the parity check.
        PrecisionRefused: the card does not offer the precision, or on this machine it costs more than the card says.
    """

    def __init__(self, artifact: Artifact, threads: int = 1, precision: str = "float32"):
        self.name, self.card, self.begin = FORMAT, artifact.card, artifact.begin()
        self.precision = precision
        others = reduced_programs(self)
        self._crew = Crew(threads)
        self._programs = {
            program: _Program(artifact, program, spec, others.get(program, spec.files)) for program, spec in artifact.card.programs.items()
        }
        self.parity = verify_parity(self, artifact)
        if others:
            verify_precision(self, artifact)

    def run(self, program: str, arrays: Mapping[str, NDArray[Any]]) -> Arrays:
        return self._programs[program](arrays, self._crew)

    def close(self) -> None:
        self._programs.clear()
        self._crew.close()


class _Program:
    """One session; the card's names stand for the graph's inputs and outputs in order."""

    def __init__(self, artifact: Artifact, program: str, spec: ProgramSpec, files: Mapping[str, str]):
        if FORMAT not in files:
            raise ArtifactError(f"{artifact.path}: program {program!r} has no ONNX file; it has {sorted(files) or 'none'}")
        file = artifact.file(files[FORMAT])
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        try:
            self._session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as exc:  # ONNX Runtime's errors share no base class that it exports
            raise ArtifactError(f"{file}: ONNX Runtime cannot load it: {exc}") from exc
        names = [node.name for node in self._session.get_inputs()]
        self._returned = [node.name for node in self._session.get_outputs()]
        if len(names) != len(spec.inputs) or len(self._returned) != len(spec.outputs):
            raise ArtifactError(
                f"{file}: {len(names)} inputs and {len(self._returned)} outputs, "
                f"the card says {len(spec.inputs)} and {len(spec.outputs)} for program {program!r}"
            )
        self._inputs = [(name, tensor.name, np.dtype(tensor.dtype)) for name, tensor in zip(names, spec.inputs, strict=True)]
        self._outputs = [tensor.name for tensor in spec.outputs]

    def __call__(self, arrays: Mapping[str, NDArray[Any]], crew: Crew) -> Arrays:
        feeds = {name: np.ascontiguousarray(arrays[tensor], dtype) for name, tensor, dtype in self._inputs}
        return dict(zip(self._outputs, crew.run(self._run, feeds), strict=True))

    def _run(self, feeds: Feeds) -> Returned:
        returned: Returned = self._session.run(self._returned, feeds)
        return returned
