"""From settings to a scheduler and the engines it runs. Besides the command line the only file that names concrete engines."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

from models.artifact import Artifact, ArtifactError
from service.engine.base import Engine
from service.engine.memory import DeviceMemory
from service.engine.parity import PrecisionRefused
from service.scheduler.scheduler import Scheduler
from service.settings import Settings
from service.telemetry import LOG


def scheduler_of(settings: Settings) -> Scheduler:
    """A scheduler with the limits of `settings`, not started."""
    return Scheduler(queue_rows=settings.queue_rows, max_wait_s=settings.max_wait_s, streams=settings.max_streams)


def builder_of(settings: Settings) -> Callable[[Artifact], Engine]:
    """What makes the engine of an artifact, as `build_preferred`; all its engines share one device memory."""
    return partial(
        build_preferred,
        settings.precision,
        engine=settings.engine,
        threads=settings.engine_threads,
        device=settings.device,
        memory=DeviceMemory(settings.device_memory_mb * 2**20 or None),
    )


def closed_form() -> Engine:
    """The exact conjugate-Gaussian stand-in."""
    from service.engine.closed_form import ClosedFormEngine

    return ClosedFormEngine()


def available_engines() -> list[str]:
    """The engines whose library is installed, the preferred one first."""
    return [name for name, library in (("onnx", "onnxruntime"), ("torchscript", "torch")) if _installed(library)]


def _installed(library: str) -> bool:
    try:
        return importlib.util.find_spec(library) is not None
    except ImportError:
        return False


def build_preferred(precision: str, artifact: Artifact, **where: Any) -> Engine:
    """`build_engine` in `precision`; where that cannot be had, in float32, and the log says why: it costs time, never nats."""
    try:
        return build_engine(artifact, **where, precision=precision)
    except PrecisionRefused as exc:
        card = artifact.card
        LOG.warning("served in float32", extra={"model": card.name, "version": card.version, "asked": precision, "reason": str(exc)})
        return build_engine(artifact, **where)


def build_engine(
    artifact: Artifact, engine: str, threads: int, device: str = "cpu", memory: DeviceMemory | None = None, precision: str = "float32"
) -> Engine:
    """`engine` is "onnx", "torchscript", or "auto": the first of the two that is installed, and on a GPU TorchScript.

    Raises:
        ArtifactError: no engine is installed, or the artifact does not run on it as it should.
        PrecisionRefused: not in this precision.
    """
    if precision != "float32" and (device != "cpu" or engine == "torchscript" or not _installed("onnxruntime")):
        raise PrecisionRefused(f"{artifact.path}: {precision} needs ONNX Runtime on the CPU")
    if device != "cpu":
        if engine == "onnx" or not _installed("torch"):
            raise ArtifactError(f"ELBOW_DEVICE={device} needs TorchScript: set ELBOW_ENGINE to auto or torchscript, and install torch")
        from service.engine.torchscript_device import TorchScriptDeviceEngine

        return TorchScriptDeviceEngine(artifact, device, memory, threads=threads)
    if engine == "auto":
        engine = next(iter(available_engines()), "none")
    if engine == "onnx":
        from service.engine.onnx import OnnxEngine

        return OnnxEngine(artifact, threads=threads, precision=precision)
    if engine == "torchscript":
        from service.engine.torchscript import TorchScriptEngine

        return TorchScriptEngine(artifact, threads=threads)
    raise ArtifactError("neither onnxruntime nor torch is installed: nothing can run this artifact")
