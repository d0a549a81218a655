"""Markdown written by the experiments: tables, and inserting them into a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


def table(rows: Sequence[Row], formats: Mapping[str, str] | None = None) -> str:
    """Rows as a Markdown table; ``formats`` gives format specifications by column, by default .2f."""
    formats = formats or {}

    def cell(name: str, value: Any) -> str:
        if value is None:
            return "–"
        return format(value, formats.get(name, ".2f")) if isinstance(value, float | int) else str(value)

    names = list(rows[0])
    numeric = {n: any(isinstance(row[n], float | int) for row in rows) for n in names}
    lines = ["| " + " | ".join(names) + " |", "|" + "|".join("---:" if numeric[n] else "---" for n in names) + "|"]
    lines += ["| " + " | ".join(cell(n, row[n]) for n in names) + " |" for row in rows]
    return "\n".join(lines)


def insert_table(page: Path, name: str, text: str) -> None:
    """Replace the text between the comments ``<!-- name -->`` and ``<!-- /name -->`` of a Markdown page.

    Raises:
        ValueError: the page does not exist, or has no such comments.
    """
    if not page.is_file():
        raise ValueError(f"docs is {str(page)!r}; there is no such page")
    start, end, whole = f"<!-- {name} -->", f"<!-- /{name} -->", page.read_text()
    if start not in whole or end not in whole:
        raise ValueError(f"docs is {str(page)!r}, which has no comments {start} and {end} to write between")
    head, rest = whole.split(start, 1)
    page.write_text(f"{head}{start}\n{text.strip()}\n{end}{rest.split(end, 1)[1]}")
