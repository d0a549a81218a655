"""Reads a ``config.json`` field by field, leniently: null means absent, ``16.0`` is an integer.

A field of another type, or a file that is not a JSON object, is rejected in a sentence that names it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path as File
from typing import Any

_REQUIRED: Any = object()
BOM = b"\xef\xbb\xbf"


def read_json(file: File) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
        ValueError: it cannot be read, or is not an object.
    """
    try:
        values = json.loads(file.read_bytes().removeprefix(BOM))
    except OSError as problem:
        raise ValueError(f"{file} cannot be read ({problem.strerror})") from None
    except (ValueError, RecursionError) as problem:
        reason = "it is nested too deeply" if isinstance(problem, RecursionError) else problem
        raise ValueError(f"{file} is not JSON: {reason}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}; it must be a JSON object")
    return values


class Fields:
    """The fields of a JSON object, by name and type. Missing ones without a default raise KeyError.

    Raises:
        ValueError: a field of another type.
    """

    def __init__(self, values: dict[str, Any], where: str = "config.json"):
        self.values, self.where = values, where

    def has(self, name: str) -> bool:
        """Whether the field is present, even if null."""
        return name in self.values

    def integer(self, name: str, default: Any = _REQUIRED) -> int:
        """A whole number."""
        value = self._get(name, default)
        if value is default:
            return value
        if not _is_number(value) or not float(value).is_integer():
            self._refuse(name, value, "a whole number")
        return int(value)

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        """A finite number."""
        value = self._get(name, default)
        if not (value is default or _is_number(value)):
            self._refuse(name, value, "a number")
        return value

    def flag(self, name: str, default: Any = _REQUIRED) -> bool:
        """True or false; 0 and 1 are accepted."""
        value = self._get(name, default)
        if not (isinstance(value, bool) or value is default or value in (0, 1)):
            self._refuse(name, value, "true or false")
        return bool(value)

    def text(self, name: str, default: Any = _REQUIRED) -> str:
        """A string."""
        value = self._get(name, default)
        if not (isinstance(value, str) or value is default):
            self._refuse(name, value, "a string")
        return value

    def fields(self, name: str) -> Fields | None:
        """A nested object; None if missing or empty."""
        value = self._get(name, None)
        if value is not None and not isinstance(value, dict):
            self._refuse(name, value, "an object")
        return Fields(value, f"{name} in {self.where}") if value else None

    def only(self, **supported: Any) -> None:
        """Reject a setting that our models do not support; absent or null counts as supported."""
        for name, value in supported.items():
            allowed = value if isinstance(value, tuple) else (value,)
            if self._get(name, None) is not None and self.values[name] not in allowed:
                raise ValueError(
                    f"{self.where} has {name} {self.values[name]!r}; supported is {' or '.join(map(repr, allowed))}"
                )

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise KeyError(name)
        return default

    def _refuse(self, name: str, value: Any, kind: str) -> None:
        raise ValueError(f"{self.where} has {name} {value!r}; it must be {kind}")


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond the float range
        return False
