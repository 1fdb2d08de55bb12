"""Removes from a virtual environment what a running server never opens: `python slim.py /opt/venv`, and prints what it saved.

Tests, C headers, type stubs and sources of compiled modules; of ONNX Runtime its tools for preparing models, which would need
`onnx`, and the C library: the Python module holds all of it once more and does not load it.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

FOLDERS = ("tests", "include", "_examples")
TOOLS = ("quantization", "tools", "transformers", "datasets", "backend")
C_LIBRARY = "onnxruntime/capi/libonnxruntime.so.*"
SOURCES = (".c", ".cpp", ".h", ".hpp", ".pxd", ".pxi", ".pyi", ".pyx", ".a")


def main(environment: Path) -> int:
    (packages,) = environment.glob("lib/python3*/site-packages")
    doomed = [path for path in packages.rglob("*") if path.is_dir() and path.name in FOLDERS]
    doomed += [packages / "onnxruntime" / name for name in TOOLS]
    before = size(packages)
    for folder in doomed:
        shutil.rmtree(folder, ignore_errors=True)  # some lie in others that are gone already
    for path in [*packages.glob(C_LIBRARY), *(path for path in packages.rglob("*") if path.suffix in SOURCES and path.is_file())]:
        path.unlink()
    print(f"{packages}: {before / 1e6:.1f} MB, {size(packages) / 1e6:.1f} MB after")
    return 0


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
