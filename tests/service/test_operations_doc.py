"""docs/operations.md has every setting with its default and meaning, as settings.py states them."""

from __future__ import annotations

from pathlib import Path

from pydantic_core import PydanticUndefined

from service.settings import Settings

DOC = Path(__file__).resolve().parents[2] / "docs" / "operations.md"


def table() -> str:
    rows = ["| `ELBOW_` | default | |", "| --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = "" if field.default in (None, "", PydanticUndefined) else str(field.default)
        meaning = (field.description or "").replace("|", "\\|")
        rows.append(f"| `{name.upper()}` | {default} | {meaning} |")
    return "\n".join(rows)


def test_the_table_of_settings_is_that_of_the_code() -> None:
    assert table() in DOC.read_text(), "docs/operations.md: put this table under Settings:\n" + table()
