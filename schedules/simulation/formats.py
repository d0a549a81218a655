"""Schedules and timelines as files: JSON of a schedule, the CSV of torch.distributed.pipelining, a Perfetto trace.

The CSV is what torch's ``_PipelineScheduleRuntime`` loads as "compute_only": one row a rank, one cell an action,
``{stage}{action}{microbatch}``. Torch's own actions are F, B (the full backward), I (the input gradient alone) and W.
The vocabulary layers are written in the same way, with the device in the stage's place:

    IF IB   the sharded input layer, forward and backward    S T   the two halves of the sharded output layer
    SM SE   S in two, maxima then exponentials (S1, S2)      H     the whole output layer on one device
    G       the backward of the final norm

So ``0F3`` is stage 0's forward of microbatch 3, and ``2IF0`` device 2's part of the input layer for microbatch 0.
``vocabulary=False`` leaves the vocabulary layers out; then torch reads the file.
"""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import asdict, fields
from typing import NamedTuple

from ..lowering.events import events_of
from ..schedule import Pass, Schedule, Step, Vocabulary
from .timeline import Timeline

_ACTION = re.compile(r"(\d+)([A-Z]+)(\d+)")
_WRITTEN = {"S1": "SM", "S2": "SE"}  # a name that ends in a digit could not be told from the microbatch
_READ = {written: name for name, written in _WRITTEN.items()}


class Action(NamedTuple):
    """One cell: ``name`` of ``stage`` (of the device, for the vocabulary layers) for ``microbatch``."""

    stage: int
    name: str
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{_WRITTEN.get(self.name, self.name)}{self.microbatch}"


def actions_of(schedule: Schedule, vocabulary: bool = True) -> tuple[tuple[Action, ...], ...]:
    """What every device runs, in order."""
    events = events_of(schedule)
    rows: list[list[Action]] = [[] for _ in range(schedule.p)]
    ran = events.op == events.code("run")
    columns = zip(
        events.device[ran].tolist(),
        events.name[ran].tolist(),
        events.stage[ran].tolist(),
        events.microbatch[ran].tolist(),
        strict=True,
    )
    for device, code, stage, microbatch in columns:
        name = events.words[code]
        if stage >= 0:
            rows[device].append(Action(stage, "I" if name == "B" and schedule.splits_backward else name, microbatch))
        elif vocabulary:
            rows[device].append(Action(device, name, microbatch))
    return tuple(tuple(row) for row in rows)


def to_csv(schedule: Schedule, vocabulary: bool = True) -> str:
    """The compute-only CSV of a schedule, one row a rank."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [str(action) for action in row] for row in actions_of(schedule, vocabulary)
    )
    return text.getvalue()


def from_csv(text: str) -> tuple[tuple[Action, ...], ...]:
    """The actions of every rank. Empty cells, which torch writes where a rank waits, are skipped.

    Raises:
        ValueError: a cell that is no action, with its row and column.
    """
    rows = []
    for rank, cells in enumerate(csv.reader(io.StringIO(text))):
        row = []
        for column, cell in enumerate(cells):
            if not (cell := cell.strip()):
                continue
            if not (match := _ACTION.fullmatch(cell)):
                raise ValueError(f"rank {rank}, column {column} is {cell!r}; an action is written as 0F3 or 1IF0")
            stage, name, microbatch = match.groups()
            row.append(Action(int(stage), _READ.get(name, name), int(microbatch)))
        rows.append(tuple(row))
    return tuple(rows)


# --- JSON ------------------------------------------------------------------------------------------------------------

_FORMAT, _VERSION = "vocabpp_jax schedule", 1


def to_json(schedule: Schedule) -> str:
    """A schedule as JSON, complete: :func:`from_json` gives it back."""
    data = {f.name: getattr(schedule, f.name) for f in fields(schedule) if f.init}
    v = schedule.vocabulary
    data["vocabulary"] = {f.name: getattr(v, f.name) for f in fields(v)} | {"steps": [asdict(s) for s in v.steps]}
    return json.dumps({"format": _FORMAT, "version": _VERSION} | data)


def from_json(text: str) -> Schedule:
    """The schedule that :func:`to_json` wrote.

    Raises:
        ValueError: not JSON, another format or version, or a field missing.
    """
    data = json.loads(text)
    if not isinstance(data, dict) or (data.pop("format", 0), data.pop("version", 0)) != (_FORMAT, _VERSION):
        raise ValueError(f"this is not a schedule of version {_VERSION}; write one with formats.to_json")
    try:
        v = data.pop("vocabulary")
        steps = tuple(Step(**_tuples(step)) for step in v.pop("steps"))
        passes = tuple(tuple(Pass(*x) for x in of_device) for of_device in data.pop("passes"))
        return Schedule(**_tuples(data), passes=passes, vocabulary=Vocabulary(**_tuples(v), steps=steps))
    except (KeyError, TypeError) as problem:
        raise ValueError(f"the schedule lacks a field or has one too many: {problem}") from problem


def _tuples(values: dict) -> dict:
    """JSON's lists as the tuples they were."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


# --- trace -----------------------------------------------------------------------------------------------------------


def to_trace(timeline: Timeline, microseconds: float = 1e6) -> str:
    """A Chrome trace of a simulated iteration, for ui.perfetto.dev: a process a device, a thread for each of passes,
    transfers and collectives, and a counter of activations in flight.

    ``microseconds`` is how many there are in a unit of the timeline's time.
    """
    threads = {"run": "passes", "permute": "transfers", "start": "collectives"}
    events: list[dict] = []
    for d in range(timeline.schedule.p):
        events.append({"ph": "M", "name": "process_name", "pid": d, "args": {"name": f"device {d}"}})
        events += [
            {"ph": "M", "name": "thread_name", "pid": d, "tid": tid, "args": {"name": name}}
            for tid, name in enumerate(threads.values())
        ]
        events += [
            {"ph": "C", "name": "in flight", "pid": d, "ts": time * microseconds, "args": {"held": count}}
            for time, count in zip(*(c.tolist() for c in timeline.in_flight(d)), strict=True)
        ]
    for s in timeline.spans():
        if s.end > s.start:
            kind = s.kind or "receive"
            stage = {"stage": s.stage} if kind in ("F", "B", "W") else {}
            events.append(
                {
                    "ph": "X",
                    "name": f"{kind} {s.microbatch}",
                    "cat": kind,
                    "pid": s.device,
                    "tid": list(threads).index(s.op),
                    "ts": s.start * microseconds,
                    "dur": (s.end - s.start) * microseconds,
                    "args": {"microbatch": s.microbatch} | stage,
                }
            )
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
