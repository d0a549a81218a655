"""Parses command lines into dataclasses, and reports errors."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, get_type_hints

import tyro

from command_line.names import with_names
from command_line.refusals import sentence_of
from vocabpp_jax.runtime import hosts

Options = TypeVar("Options")
Result = TypeVar("Result")

OptionalInt = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(optional)")]
OptionalFloat = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="(optional)")]
OptionalStr = Annotated[str | None, tyro.conf.arg(metavar="STR", help_behavior_hint="(optional)")]
_BUCKET = "can be in a bucket"
BucketPath = Annotated[str, _BUCKET]
OptionalBucketPath = Annotated[str | None, tyro.conf.arg(metavar="STR", help_behavior_hint="(optional)"), _BUCKET]


def parse(options: type[Options], description: str, arguments: Sequence[str] | None = None) -> Options:
    """Parse the command line into a dataclass; invalid input ends the process as :func:`fail` does.

    ``~`` at the beginning of a path is expanded even where a shell would not. Only :data:`BucketPath` options may name
    a bucket.
    """
    hosts.quiet_plugins()
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed = tyro.cli(
                options,
                args=with_names(options, sys.argv[1:] if arguments is None else arguments),
                description=description,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        fail(sentence_of(said.getvalue()))
    return or_fail(lambda: _with_paths(parsed))


def _with_paths(options: Options) -> Options:
    """The options with every path expanded."""
    hints, changed = get_type_hints(type(options), include_extras=True), {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            changed[field.name] = _with_paths(value)
        elif isinstance(value, str):
            bucket = _BUCKET in getattr(hints[field.name], "__metadata__", ())
            changed[field.name] = _checkpoints(value) if bucket else _local(field.name, value)
        elif isinstance(value, tuple):
            changed[field.name] = tuple(_local(field.name, x) if isinstance(x, str) else x for x in value)
    return dataclasses.replace(options, **changed)


def _checkpoints(value: str) -> str:
    from vocabpp_jax.checkpoints import folder_path  # takes seconds to import, and most scripts do not need it

    return os.fspath(folder_path(value))


def _local(name: str, value: str) -> str:
    if re.match("[A-Za-z][A-Za-z0-9+.-]+://", value):
        raise ValueError(f"{name} is {value!r}; it must be on this machine's file system")
    expanded = os.path.expanduser(value)
    if expanded.startswith("~"):
        raise ValueError(f"{name} is {value!r}, which names a user that does not exist; write it in full")
    return expanded


def write_json(path: str | None, value: Any, indent: int = 1) -> None:
    """Write JSON for ``--json``: to a file, to standard output if -, or not at all. Fails with a sentence if the file
    cannot be written."""
    if path == "-":
        print(json.dumps(value, indent=indent))
    elif path:
        write_text("json", path, json.dumps(value, indent=indent) + "\n")


def write_text(option: str, path: str, text: str) -> None:
    """Write a file named by an option, or fail with a sentence if it cannot be written."""
    try:
        Path(path).write_text(text)
    except OSError as problem:
        fail(f"{option} is {path}; it cannot be written: {problem.strerror}")


def or_fail(prepare: Callable[[], Result]) -> Result:
    """Call ``prepare``; a ValueError, which is how invalid input is reported here, ends the process."""
    try:
        return prepare()
    except ValueError as problem:
        fail(str(problem))


def fail(sentence: str, status: int = 2) -> NoReturn:
    """Print what is wrong and what would do on one line, and exit; status 2 is for invalid input."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(sentence.split()))
    print(f"error: {line if len(line) <= 1500 else line[:1500] + '...'}", file=sys.stderr)
    raise SystemExit(status)
