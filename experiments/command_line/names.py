"""Names on the command line in any case: ``--model 4b`` is ``4B``, ``--schedule V-Half`` is ``v-half``."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from vocabpp_jax import models, schedules
from vocabpp_jax.names import as_spelt

Options = TypeVar("Options")


def _names() -> dict[str, Iterable[str]]:
    """The names that an option may be given, by option; other values, such as a path, stay as they are."""
    return {
        "model": models.SIZES,
        "schedule": schedules.SCHEDULES,
        "schedules": schedules.SCHEDULES,
        "method": schedules.METHODS,
        "methods": schedules.METHODS,
        "dtype": models.Config.CHOICES["dtype"],
        "residuals": models.Config.CHOICES["residuals"],
        "data": ("stdlib",),
    }


def with_names(options: Options) -> Options:
    """The options with every name as it is spelt."""
    names, changed = _names(), {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            changed[field.name] = with_names(value)
        elif field.name in names and isinstance(value, str):
            changed[field.name] = as_spelt(value, names[field.name])
        elif field.name in names and isinstance(value, tuple):
            changed[field.name] = tuple(as_spelt(x, names[field.name]) if isinstance(x, str) else x for x in value)
    return dataclasses.replace(options, **changed)


def with_choices(options: type, arguments: Sequence[str]) -> list[str]:
    """The arguments with the values of options that have a fixed choice (``Literal``) as they are spelt."""
    flags, positional = {}, []
    for name, choices, is_positional in _choices(options):
        if is_positional:
            positional.append(choices)
        else:
            flags[f"--{name}"] = choices
    spelt: list[str] = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        before = spelt[-1].replace("_", "-") if spelt else ""
        if equals and (choices := flags.get(flag.replace("_", "-"))):
            spelt.append(f"{flag}={as_spelt(value, choices)}")
        elif before in flags:
            spelt.append(as_spelt(argument, flags[before]))
        elif positional and not argument.startswith("--") and not before.startswith("--"):
            spelt.append(as_spelt(argument, positional.pop(0)))  # those with a choice come first
        else:
            spelt.append(argument)
    return spelt


def _choices(options: type) -> Iterator[tuple[str, list[str], bool]]:
    """Of every field with a fixed choice: its option, the choices, and whether it is given by its place."""
    for name, hint in get_type_hints(options, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            yield from _choices(hint)
        elif found := [value for value in _literals(hint) if isinstance(value, str)]:
            is_positional = get_origin(hint) is Annotated and tyro.conf.Positional in get_args(hint)
            yield name.replace("_", "-"), found, is_positional


def _literals(hint: Any) -> list[Any]:
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    if get_origin(hint) in (Annotated, Union, types.UnionType, tuple):
        return [value for part in get_args(hint) for value in _literals(part)]
    return []
