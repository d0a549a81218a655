"""Case-insensitive lookup of names that people type."""

from __future__ import annotations

from collections.abc import Iterable


def as_spelt(value: str, names: Iterable[str]) -> str:
    """The one of ``names`` that equals ``value`` up to case; ``value`` itself if there is none."""
    names = tuple(names)
    return value if value in names else next((n for n in names if n.casefold() == value.casefold()), value)
