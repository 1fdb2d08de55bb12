"""Options and fixtures of the whole suite: which device and precision to test on, and one seeded generator.

Torch is imported only by the fixtures that need it, so that the service's tests run where it is not installed.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when onnxruntime is first imported: it writes into the home folder
# one process each, which start faster; those of tests/service/apart, streams and operations say otherwise
os.environ.setdefault("ELBOW_ENGINE_PROCESS", "off")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers share the cores: two threads each would wait for one another
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a job in the background of a script ignores Ctrl-C, which some tests send
    signal.signal(signal.SIGINT, signal.default_int_handler)

LONG = (
    "test_shipped.py",
    "test_export_filter.py",
    "test_server.py",
    "test_sequence_loop.py",
    "test_filter_tracing.py",
    "test_evaluate_filter.py",
    "test_precision.py",
    "test_export.py",
    "test_make.py",
    "test_processes.py",
    "test_schemathesis.py",
    "test_tracing.py",
    "test_engines.py",
    "test_under_load.py",
    "test_train_benchmark.py",
    "test_kalman_agreement.py",
    "test_race.py",
    "test_loop.py",
)
"""Modules that take long, begun first where several processes share the tests, so that none is left alone with one of them."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device of the numerical tests: cpu (default) or cuda")
    parser.addoption("--dtype", default="float64", choices=("float32", "float64"), help="precision of the numerical tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long modules first; tests marked `gpu` are skipped, with the reason, where there is no CUDA device."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _has_cuda():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of --device."""
    torch = pytest.importorskip("torch")
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The precision of --dtype."""
    torch = pytest.importorskip("torch")
    return getattr(torch, request.config.getoption("--dtype"))


@pytest.fixture
def generator(device: torch.device) -> torch.Generator:
    """A generator on the test's device, the same for every test."""
    torch = pytest.importorskip("torch")
    return torch.Generator(device=device).manual_seed(0)


def _has_cuda() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()
