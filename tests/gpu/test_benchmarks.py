"""The benchmarks that wait for a GPU run through on the CPU at tiny sizes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "said"), [("gpu.py", ("step_us", "streams at 80/s", "row-steps/s")), ("kernels.py", ("kernels", "torchscript"))]
)
def test_a_benchmark_prints_its_tables(script, said):
    command = [sys.executable, f"benchmarks/{script}", "--device", "cpu", "--batches", "1", "3", "--seconds", "0.02", "--keep", ""]
    command += ["--validation-rows", "0"] if script == "gpu.py" else []  # no data set is at hand
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    printed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=250).stdout
    assert all(word in printed for word in said)
    assert "kept in" not in printed
