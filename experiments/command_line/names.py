"""Case-insensitive names on the command line: ``--model 4b`` is ``4B``, ``--schedule V-Half`` is ``v-half``."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from vocabpp_jax import models, schedules
from vocabpp_jax.schedules.spelling import as_spelt

_NAMES: dict[str, Iterable[str]] = {
    "model": models.SIZES,
    "schedule": schedules.SCHEDULES,
    "schedules": schedules.SCHEDULES,
    "method": schedules.METHODS,
    "methods": schedules.METHODS,
    "dtype": models.Config.CHOICES["dtype"],
    "residuals": models.Config.CHOICES["residuals"],
    "data": ("stdlib",),
}
"""Names accepted by free-text options. Other values of these options, such as paths, are left unchanged."""


def with_names(options: type, arguments: Sequence[str]) -> list[str]:
    """The arguments with names in their canonical case: those above, and values of options with fixed choices
    (``Literal``). A flag without a value is on."""
    flags: dict[str, Iterable[str]] = {}
    positional: list[list[str]] = []  # positionals with choices come before those without
    for name, choices, by_place in _options(options):
        if by_place and choices:
            positional.append(choices)
        elif not by_place and (names := choices or _NAMES.get(name)):
            flags[f"--{name}"] = names
    spelt, names, after_flag = [], (), False
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue="--"):
        flag, equals, value = argument.partition("=")
        if argument.startswith("--"):
            names, after_flag = flags.get(flag.replace("_", "-"), ()), not equals
            spelt.append(f"{flag}={as_spelt(value, names)}" if equals else argument)
            spelt += ["on"] if names == ["on", "off"] and after_flag and following.startswith("--") else []
        elif positional and not after_flag:
            spelt.append(as_spelt(argument, positional.pop(0)))
        else:
            spelt.append(as_spelt(argument, names))
            after_flag = False
    return spelt


def _options(options: type) -> Iterator[tuple[str, list[str], bool]]:
    """For every field: its option, its choices, and whether it is positional."""
    for name, hint in get_type_hints(options, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            yield from _options(hint)
        else:
            by_place = get_origin(hint) is Annotated and tyro.conf.Positional in get_args(hint)
            yield name.replace("_", "-"), [value for value in _literals(hint) if isinstance(value, str)], by_place


def _literals(hint: Any) -> list[Any]:
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    if get_origin(hint) in (Annotated, Union, types.UnionType, tuple):
        return [value for part in get_args(hint) for value in _literals(part)]
    return []
