"""File formats of schedules and timelines: schedule JSON, the CSV of torch.distributed.pipelining, a Perfetto trace.

The CSV is what torch's ``_PipelineScheduleRuntime`` loads as "compute_only": one row per rank, one cell per action,
``{stage}{action}{microbatch}``. Torch's actions are F, B (the full backward), I (only the input gradient) and W. The
vocabulary layers can be written in the same way, with the device in place of the stage:

    EF EB   the sharded input layer, forward and backward    S T   the two halves of the sharded output layer
    SM SE   S in two, maxima then exponentials (S1, S2)      H     the whole output layer on one device
    G       the backward of the final norm

So ``0F3`` is stage 0's forward of microbatch 3, and ``2EF0`` device 2's part of the input layer for microbatch 0.
``vocabulary=False`` leaves the vocabulary layers out so that torch can run the file. Torch rejects a file that has
them: their names are chosen not to begin with any of its own, which it would read instead.
"""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from ..instructions import DEVICE_PASSES, KINDS, STAGE_PASSES
from ..lowering.events import events_of
from ..orders import from_orders
from ..schedule import Schedule
from .timeline import Timeline

_CELL = re.compile(r"([0-9]{1,9})([A-Z_]+)([0-9]{0,9})|\(.*\)(OVERLAP_F_B)")
# Torch matches names by prefix (IF as I), and a name that ends in a digit would run into the microbatch.
_WRITTEN = {kind.name: kind.spelling for kind in KINDS.values() if kind.spelling}
_READ = {written: name for name, written in _WRITTEN.items()}
_OF_STAGES = (*STAGE_PASSES, "I")
_OF_DEVICES = tuple(name for name in (*DEVICE_PASSES, *_READ) if name.isalpha())
_OF_TORCH = ("SEND_F", "RECV_F", "SEND_B", "RECV_B", "UNSHARD", "RESHARD", "REDUCE_GRAD", "OVERLAP_F_B")


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
    """The compute-only CSV of a schedule, one row per rank."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [str(action) for action in row] or [""] for row in actions_of(schedule, vocabulary)
    )
    return text.getvalue()


def from_csv(text: str) -> tuple[tuple[Action, ...], ...]:
    """The actions of every rank. Skips empty cells, which torch writes where a rank waits, blank lines, and lines that
    begin with ``#``.

    Raises:
        ValueError: no rows, or a cell that is not a compute-only action, with its row and column.
    """
    lines = [line for line in text.removeprefix("\ufeff").splitlines() if line.strip() and line.lstrip()[0] != "#"]
    try:
        rows = list(csv.reader(lines))
    except csv.Error as problem:
        raise ValueError(f"the schedule is not CSV: {problem}") from None
    if not rows:
        raise ValueError("the schedule has no rows; give one per rank")
    return tuple(
        tuple(_action(cell.strip(), rank, column) for column, cell in enumerate(cells) if cell.strip())
        for rank, cells in enumerate(rows)
    )


def schedule_from_csv(text: str, method: str = "baseline", name: str = "custom") -> Schedule:
    """A runnable schedule from a CSV without vocabulary layers, written by torch or :func:`to_csv`.

    Every pass starts as soon as its device is free and its input is there, see
    :func:`vocabpp_jax.schedules.from_orders`.

    Raises:
        ValueError: what :func:`from_csv` rejects, vocabulary layers, a stage on two ranks or on none, or unsound
            orders.
    """
    rows = from_csv(text)
    home: dict[int, int] = {}
    for rank, row in enumerate(rows):
        for action in row:
            if action.name not in _OF_STAGES:
                raise ValueError(
                    f"rank {rank} runs {action}, a part of the vocabulary layers; write the CSV with vocabulary=False, "
                    "or the schedule as JSON"
                )
            if home.setdefault(action.stage, rank) != rank:
                raise ValueError(f"stage {action.stage} is on rank {home[action.stage]} and on rank {rank}; it has one")
    if sorted(home) != list(range(len(home))):
        raise ValueError(f"the stages are {sorted(home)[:10]}; they must be 0, 1, 2 and so on")
    orders = [" ".join(map(str, row)) for row in rows]
    return from_orders(orders, tuple(home[stage] for stage in range(len(home))), method, name=name)


def _action(cell: str, rank: int, column: int) -> Action:
    match, where = _CELL.fullmatch(cell), f"rank {rank}, column {column} is {cell[:40]!r}"
    stage, action, microbatch, overlap = match.groups() if match else (None, None, None, None)
    if overlap or action in _OF_TORCH:
        raise ValueError(
            f"{where}, an {overlap or action} of torch; give its compute-only form, which has F, B, I and W alone"
        )
    if not microbatch or action not in (*_OF_STAGES, *_OF_DEVICES):
        raise ValueError(f"{where}; an action is written as 0F3, its name one of {', '.join(_OF_STAGES + _OF_DEVICES)}")
    return Action(int(stage), _READ.get(action, action), int(microbatch))


# --- JSON ------------------------------------------------------------------------------------------------------------

_FORMAT, _VERSION = "vocabpp_jax schedule", 1


def to_json(schedule: Schedule) -> str:
    """A schedule as complete JSON: :func:`from_json` restores it."""
    return json.dumps({"format": _FORMAT, "version": _VERSION} | _plain(schedule))


def from_json(text: str) -> Schedule:
    """The schedule that :func:`to_json` wrote.

    Raises:
        ValueError: not JSON, another format or version, or a field that is missing, unknown or of another type.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"the schedule is not JSON: {problem}") from None
    if not isinstance(data, dict) or (data.pop("format", 0), data.pop("version", 0)) != (_FORMAT, _VERSION):
        raise ValueError(f"this is not a schedule of version {_VERSION}; write one with formats.to_json")
    return _typed(Schedule, data, "the schedule")


def _plain(value: Any) -> Any:
    """Frozen dataclasses, tuples and sets as JSON values."""
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value) if f.init}
    if isinstance(value, frozenset):
        value = sorted(value)
    return [_plain(x) for x in value] if isinstance(value, tuple | list) else value


def _typed(kind: Any, value: Any, where: str) -> Any:
    """The inverse of :func:`_plain` for a value of an annotated type. Raises ValueError on a mismatch."""
    origin, parts = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _object(kind, value, where)
    if origin in (Union, UnionType):
        if value is None and NoneType in parts:
            return None
        return _typed(next(part for part in parts if part is not NoneType), value, where)
    if origin is Literal and value in parts and isinstance(value, str | int):
        return parts[parts.index(value)]  # a False that an earlier version wrote is 0
    if isinstance(value, list):
        if hints := getattr(kind, "_fields", None) and get_type_hints(kind):
            parts = tuple(hints.values())
            if len(parts) == len(value):
                return kind(*(_typed(part, x, where) for part, x in zip(parts, value, strict=True)))
        if origin in (tuple, frozenset) and (origin is frozenset or parts[1:] == (...,)):
            return origin(_typed(parts[0], x, where) for x in value)
        if origin is tuple and len(parts) == len(value):
            return tuple(_typed(part, x, where) for part, x in zip(parts, value, strict=True))
    elif type(value) is kind:
        return value
    raise ValueError(f"{where} has {str(value)[:40]!r} where there must be {getattr(kind, '__name__', kind)}")


def _object(kind: type, value: Any, where: str) -> Any:
    named = {field.name: field for field in fields(kind) if field.init}
    needed = {n for n, f in named.items() if f.default is MISSING and f.default_factory is MISSING}
    if not isinstance(value, dict) or not needed <= set(value) <= set(named):
        odd = sorted((needed - set(value)) | (set(value) - set(named))) if isinstance(value, dict) else sorted(needed)
        raise ValueError(f"{where} lacks a field or has one too many: {', '.join(map(str, odd))}")
    hints = get_type_hints(kind)
    return kind(**{name: _typed(hints[name], x, f"{name} of {where}") for name, x in value.items()})


# --- trace -----------------------------------------------------------------------------------------------------------


def to_trace(timeline: Timeline, microseconds: float = 1e6) -> str:
    """A Chrome trace of a simulated iteration, for ui.perfetto.dev: one process per device, with a thread each for
    passes, transfers and collectives, and a counter of activations in flight.

    ``microseconds`` is the timeline's unit of time in microseconds.
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
            stage = {"stage": s.stage} if kind in STAGE_PASSES else {}
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
