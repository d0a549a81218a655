"""Names that people type: the case of letters does not matter."""

from __future__ import annotations

from collections.abc import Iterable


def as_spelt(value: str, names: Iterable[str]) -> str:
    """The one of ``names`` that differs from ``value`` in the case of letters alone; ``value`` if there is none."""
    names = tuple(names)
    return value if value in names else next((n for n in names if n.casefold() == value.casefold()), value)
