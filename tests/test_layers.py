"""The import rule of the three packages, checked on the source itself: who may import whom.

    training -> models <- (models.artifact only) - service          training and service never meet

A relative import counts as the module it means; an import inside a function counts like one at the top.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("models", "service", "training")
MODULES = sorted(path.relative_to(ROOT) for package in OURS for path in (ROOT / package).rglob("*.py"))
SERVICE = [path for path in MODULES if path.parts[0] == "service"]
TRAINING = [path for path in MODULES if path.parts[0] == "training"]
MODELS = [path for path in MODULES if path.parts[0] == "models"]
ENTRY_POINTS = (Path("service/__main__.py"), Path("service/ray_app.py"))


@cache
def imported(path: Path) -> frozenset[str]:
    """Absolute dotted names of everything the file imports: `from a import b` counts as both `a` and `a.b`."""
    return frozenset(_imports(ast.parse((ROOT / path).read_text(), str(path)), path))


def _imports(tree: ast.AST, path: Path) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(path.parts[: len(path.parts) - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imports_any(path: Path, *packages: str) -> set[str]:
    """What the file imports of the packages or of what lies in them."""
    return {name for name in imported(path) for package in packages if name == package or name.startswith(package + ".")}


@pytest.mark.parametrize("path", MODELS, ids=str)
def test_models_import_neither_training_nor_service(path: Path) -> None:
    assert not imports_any(path, "training", "service")


@pytest.mark.parametrize("path", TRAINING, ids=str)
def test_training_never_imports_service(path: Path) -> None:
    assert not imports_any(path, "service")


@pytest.mark.parametrize("path", SERVICE, ids=str)
def test_service_imports_of_ours_only_itself_and_the_artifact(path: Path) -> None:
    assert not imports_any(path, "training")
    assert not {name for name in imports_any(path, "models") if name != "models" and not name.startswith("models.artifact")}


@pytest.mark.parametrize("path", SERVICE, ids=str)
def test_only_its_engine_imports_a_heavy_library(path: Path) -> None:
    if not path.match("service/engine/torch*.py"):
        assert not imports_any(path, "torch")
    if path != Path("service/engine/onnx.py"):
        assert not imports_any(path, "onnxruntime")
    if path != Path("service/ray_app.py"):
        assert not imports_any(path, "ray")


@pytest.mark.parametrize("name", ["errors", "telemetry"])
def test_errors_and_telemetry_import_nothing_of_ours(name: str) -> None:
    path = Path("service", f"{name}.py")
    assert path in MODULES
    assert not imports_any(path, *OURS)


@pytest.mark.parametrize("path", [path for path in MODULES if path not in ENTRY_POINTS], ids=str)
def test_nobody_imports_the_app_but_what_starts_it(path: Path) -> None:
    assert not imports_any(path, "service.app")


@pytest.mark.parametrize("path", SERVICE, ids=str)
def test_only_building_and_the_command_line_name_a_concrete_engine(path: Path) -> None:
    if path not in (Path("service/building.py"), Path("service/__main__.py")):
        engines = {"service.engine.onnx", "service.engine.torchscript", "service.engine.torchscript_device", "service.engine.closed_form"}
        if path == Path("service/engine/torchscript_device.py"):
            engines.remove("service.engine.torchscript")  # the same programs, loaded the same way
        assert not imports_any(path, *engines)


def test_the_artifact_module_needs_no_torch() -> None:
    assert not imports_any(Path("models/artifact.py"), "torch", "safetensors.torch", "models", *OURS)


def test_importing_the_models_package_loads_nothing() -> None:
    assert (ROOT / "models/__init__.py").read_text() == ""


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import torch.nn as nn", "torch.nn"),
        ("from torch import nn", "torch"),
        ("from models import gaussian", "models.gaussian"),
        ("from ..app import create_app", "service.app.create_app"),
        ("from . import base", "service.engine.base"),
        ("def late():\n    import onnxruntime", "onnxruntime"),
    ],
)
def test_every_form_of_import_is_seen(source: str, name: str) -> None:
    assert name in set(_imports(ast.parse(source), Path("service/engine/some.py")))
