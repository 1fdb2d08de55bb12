"""JSON that commands leave on disk: whole files without NaN, and logs whose last line a kill may have cut short."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


def finite(value: Any) -> Any:
    """JSON has no NaN nor infinity: null."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(file: Path, value: Any) -> Path:
    """Writes `value` with null for what is not finite, and gives the file."""
    return write_text(file, json.dumps(finite(value), indent=1, allow_nan=False) + "\n")


def write_text(file: Path, text: str) -> Path:
    """Writes beside the file and moves it there, so a kill leaves the previous one whole."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)
    return file


def read_epochs(log: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl, one an epoch; one cut short by a kill is left out. Empty if there is no file."""
    entries = []
    for line in log.read_text(errors="replace").splitlines() if log.exists() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict) and "epoch" in entry:
            entries.append(entry)
    return entries
