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
from typing import NamedTuple

from .events import events_of
from .schedule import Pass, Schedule, Step, Vocabulary
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
    columns = zip(events.device[ran].tolist(), events.name[ran].tolist(), events.stage[ran].tolist(),
                  events.microbatch[ran].tolist(), strict=True)
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
        [str(action) for action in row] for row in actions_of(schedule, vocabulary))
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
                raise ValueError(f"rank {rank}, column {column} is {cell!r}; write stage, action, microbatch: 0F3 or 1IF0")
            stage, name, microbatch = match.groups()
            row.append(Action(int(stage), _READ.get(name, name), int(microbatch)))
        rows.append(tuple(row))
    return tuple(rows)


# --- JSON ------------------------------------------------------------------------------------------------------------

_VERSION = 1


def to_json(schedule: Schedule) -> str:
    """A schedule as JSON, complete: :func:`from_json` gives it back."""
    v = schedule.vocabulary
    return json.dumps({
        "format": "vocabpp_jax schedule", "version": _VERSION, "name": schedule.name, "p": schedule.p, "m": schedule.m,
        "interval": schedule.interval, "placement": schedule.placement, "layer_counts": schedule.layer_counts,
        "passes": [[list(x) for x in passes] for passes in schedule.passes],
        "vocabulary": {"method": v.method, "inserted_intervals": v.inserted_intervals, "shifts": v.shifts,
                       "steps": [{"op": s.op, "name": s.name, "at": s.at, "after": s.after} for s in v.steps]},
    })


def from_json(text: str) -> Schedule:
    """The schedule that :func:`to_json` wrote.

    Raises:
        ValueError: not JSON, another format or version, or a field missing.
    """
    data = json.loads(text)
    if not isinstance(data, dict) or (data.get("format"), data.get("version")) != ("vocabpp_jax schedule", _VERSION):
        raise ValueError(f"this is not a schedule of version {_VERSION}; write one with formats.to_json")
    try:
        v = data["vocabulary"]
        steps = tuple(Step(s["op"], s["name"], tuple(s["at"]), s["after"]) for s in v["steps"])
        counts = data["layer_counts"]
        return Schedule(data["name"], data["p"], data["m"], data["interval"], tuple(data["placement"]),
                        tuple(tuple(Pass(*x) for x in passes) for passes in data["passes"]),
                        Vocabulary(v["method"], steps, tuple(v["shifts"]), v["inserted_intervals"]),
                        None if counts is None else tuple(counts))
    except (KeyError, TypeError) as problem:
        raise ValueError(f"the schedule lacks or mistakes a field: {problem}") from problem


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
        events += [{"ph": "M", "name": "thread_name", "pid": d, "tid": tid, "args": {"name": name}}
                   for tid, name in enumerate(threads.values())]
        events += [{"ph": "C", "name": "in flight", "pid": d, "ts": time * microseconds, "args": {"microbatches": count}}
                   for time, count in zip(*(c.tolist() for c in timeline.in_flight(d)), strict=True)]
    for s in timeline.spans():
        if s.end > s.start:
            kind = s.kind or "receive"
            stage = {"stage": s.stage} if kind in ("F", "B", "W") else {}
            events.append({"ph": "X", "name": f"{kind} {s.microbatch}", "cat": kind, "pid": s.device,
                           "tid": list(threads).index(s.op), "ts": s.start * microseconds,
                           "dur": (s.end - s.start) * microseconds, "args": {"microbatch": s.microbatch} | stage})
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


# --- measured times --------------------------------------------------------------------------------------------------


class MeasuredRow(NamedTuple):
    """One run of a file of measured pass times; milliseconds, one number a device."""

    method: str
    seq_length: int
    vocab_size: int
    F: tuple[float, ...]
    B: tuple[float, ...]
    S_plus_T: tuple[float, ...]
    IF: tuple[float, ...]
    IB: tuple[float, ...]
    last_stage_layers: int
    iteration_ms: float


def read_pass_times(text: str) -> tuple[MeasuredRow, ...]:
    """The rows of a CSV of measured pass times, in the columns of ``docs/paper/pass_times_8xA100.csv``.

    Raises:
        ValueError: a column is missing, or a row's columns name different numbers of devices.
    """
    rows = []
    for number, row in enumerate(csv.DictReader(io.StringIO(text)), start=1):
        try:
            times = [_milliseconds(row[f"{c}_us"]) for c in ("f", "b", "s_plus_t", "input_f", "input_b")]
            rows.append(MeasuredRow(row["method"], int(row["seq_length"]), int(row["vocab_size"]), *times,
                                    int(row["last_stage_layers"]), float(row["iteration_ms"])))
        except KeyError as missing:
            raise ValueError(f"the file of pass times has no column {missing.args[0]!r}") from missing
        except (TypeError, ValueError) as problem:
            raise ValueError(f"row {number} of the pass times cannot be read: {problem}") from problem
        if len({len(t) for t in times}) != 1:
            raise ValueError(f"row {number} of the pass times has cells of {sorted({len(t) for t in times})} numbers; "
                             "give one a device in each")
    if not rows:
        raise ValueError("the file of pass times has no rows")
    return tuple(rows)


def _milliseconds(cell: str) -> tuple[float, ...]:
    return tuple(float(x) / 1e3 for x in cell.split())
