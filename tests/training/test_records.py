"""JSON that is always JSON, and logs with a line cut short."""

from __future__ import annotations

import json
import math
from pathlib import Path

from training.records import read_epochs, write_json


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    file = write_json(tmp_path / "a.json", {"a": math.nan, "b": [1.5, -math.inf], "c": ({"d": math.nan},), "e": "nan"})
    assert json.loads(file.read_text()) == {"a": None, "b": [1.5, None], "c": [{"d": None}], "e": "nan"}
    assert "NaN" not in file.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_line_cut_short_is_left_out(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert read_epochs(log) == []
    for rest in (b'{"epoch": 2, "upd', b"12", b"\xc3"):
        log.write_bytes(b'{"epoch": 1}\n' + rest)
        assert read_epochs(log) == [{"epoch": 1}]
