"""Plan files: plan.py writes them and train.py runs them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from command_line.options import ModelOptions, PipelineOptions

_FORMAT = {"format": "vocabpp_jax plan", "version": 1}


def to_text(model: ModelOptions, pipeline: PipelineOptions, expected: dict[str, Any]) -> str:
    """The file's text: non-default model and pipeline options, and the expected performance."""
    parts = {"model": _given(model), "pipeline": _given(pipeline)}
    return json.dumps(_FORMAT | parts | {"expected": expected}, indent=1) + "\n"


def read(path: str) -> tuple[ModelOptions, PipelineOptions]:
    """The options in a file. Raises ValueError if plan.py did not write it."""
    try:
        found = json.loads(Path(path).read_text())
        if {name: found[name] for name in _FORMAT} != _FORMAT:
            raise ValueError("it has another format")
        return ModelOptions(**found["model"]), PipelineOptions(**found["pipeline"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise ValueError(f"plan is {path!r}, which is not a plan of experiments/plan.py: {reason}") from None


def merged(path: str | None, model: ModelOptions, pipeline: PipelineOptions) -> tuple[ModelOptions, PipelineOptions]:
    """The options of a run: those of the plan, if there is one.

    Raises:
        ValueError: the file is not a plan, or an option given alongside contradicts it.
    """
    if path is None:
        return model, pipeline
    planned = read(path)
    for given, theirs in zip((model, pipeline), planned, strict=True):
        for name, value in _given(given).items():
            if value != (chosen := getattr(theirs, name)):
                raise ValueError(f"{name} is {value}, and in plan {path!r} it is {chosen}; leave one of them out")
    return planned


def _given(options: ModelOptions | PipelineOptions) -> dict[str, Any]:
    """The options that differ from their defaults."""
    default = type(options)()
    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    return {name: value for name, value in values.items() if value != getattr(default, name)}
