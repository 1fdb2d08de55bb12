"""What every benchmark does with its numbers: print one table, and keep them with machine, date and commit."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in plain text, first column left, numbers right; floats with three significant digits."""
    cells = [list(columns), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def keep(name: str, results: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Writes <name>.json into benchmarks/results, or where a run that is only a trial should leave it, and returns its path."""
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.json"
    file.write_text(json.dumps({**where_and_when(), **results}, indent=1) + "\n")
    return file


def artifact_name(path: Path) -> str:
    """name/version of an artifact's folder: where it lay on this machine is nobody's business."""
    return "/".join(path.resolve().parts[-2:])


def where_and_when() -> dict[str, Any]:
    """Date, commit, machine and libraries of what is measured now."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=RESULTS.parent).stdout.strip()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or "unknown",
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()},
        "libraries": {name: version(name) for name in ("numpy", "onnxruntime", "torch") if find_spec(name)},
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:.0f}" if isinstance(value, float) else str(value)
