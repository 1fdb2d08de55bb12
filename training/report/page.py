"""One HTML page that needs nothing else: figures embedded, captions that say what was measured, and the numbers of the race."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #222; background: #fff; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
img { max-width: 100%; height: auto; } figure { margin: 0; } figcaption { color: #444; font-size: .92rem; }
table { border-collapse: collapse; font-size: .9rem; margin: 1rem 0; }
th, td { text-align: right; padding: .2rem .8rem; border-bottom: 1px solid #ddd; } th:first-child, td:first-child { text-align: left; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .92rem; } dt { color: #666; } dd { margin: 0; }
"""


@dataclass(frozen=True)
class Entry:
    """A figure on the page. `table`: header row and rows of cells, shown under it."""

    title: str
    png: Path
    caption: str
    table: Sequence[Sequence[str]] = ()


def page(title: str, facts: Mapping[str, Any], entries: Sequence[Entry]) -> str:
    """The document. `facts` are shown as a list at the top."""
    listed = "".join(f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n<h1>{escape(title)}</h1>\n<dl>{listed}</dl>\n"
        + "\n".join(_section(entry) for entry in entries)
        + "\n</body></html>\n"
    )


def _section(entry: Entry) -> str:
    data = base64.b64encode(entry.png.read_bytes()).decode()
    image = f'<img alt="{escape(entry.title, quote=True)}" src="data:image/png;base64,{data}">'
    return (
        f"<h2>{escape(entry.title)}</h2>\n<figure>{image}\n<figcaption>{escape(entry.caption)}</figcaption></figure>\n{_table(entry.table)}"
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    head, *body = rows
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table>"
