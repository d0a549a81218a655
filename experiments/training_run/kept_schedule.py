"""A run's schedule: built once and stored in config.json, so that a resumed run executes the same program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax

from training_run.train_options import TrainOptions
from vocabpp_jax.models import Config
from vocabpp_jax.runtime import hosts
from vocabpp_jax.runtime.hardware import known_gpu
from vocabpp_jax.schedules import Schedule
from vocabpp_jax.schedules.simulation import formats


def decide_schedule(options: TrainOptions, config: Config, output: Path) -> Schedule:
    """The schedule of an earlier part of this run if its options and sizes were the same, else a new one for this
    machine's devices. The same in all processes.

    Raises:
        ValueError: something that cannot be scheduled.
    """
    depth = options.model.mtp_depth
    decided_by = inputs(options, config)
    kept = hosts.from_first(jax.process_index() == 0 and _kept(output, decided_by) or None)
    if kept is not None:
        return formats.from_json(kept)
    return hosts.agree(lambda: options.pipeline.build(config, known_gpu(jax.devices()[0]), mtp_depth=depth))


def inputs(options: TrainOptions, config: Config) -> dict[str, Any]:
    """The options that determine a run's schedule, as stored in config.json."""
    names = ("schedule", "method", "stages", "chunks", "redis_split", "microbatches", "microbatch_size")
    sizes = {name: getattr(config, name) for name in ("layers", "hidden", "seq", "vocab_size")}
    found = {name: getattr(options.pipeline, name) for name in (*names, "no_overlap", "fit")}
    return found | sizes | {"mtp_depth": options.model.mtp_depth}


def record(schedule: Schedule, options: TrainOptions, config: Config) -> dict[str, Any]:
    """What config.json stores: the options that determined the schedule, and the schedule as one line of JSON."""
    return {"decided_by": inputs(options, config), "json": formats.to_json(schedule)}


def _kept(output: Path, decided_by: dict[str, Any]) -> str | None:
    """The schedule in a folder's config.json, if it is readable and the same options determined it."""
    try:
        kept = json.loads((output / "config.json").read_text())["schedule"]
        formats.from_json(kept["json"])
        return kept["json"] if kept["decided_by"] == decided_by else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a new folder, or from a version that did not store it
