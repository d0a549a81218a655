"""Lowering: from a schedule to one program that every device runs.

The program is a few scans over intervals of ``K`` slots. Their bodies are straight lists of instructions, the same on
every device; tables say for which microbatch, if any, a device runs one, and which cell of which ring buffer it uses.
The executor compiles this list and the simulator times it, so what is simulated is what runs.

Order inside a slot: see :mod:`.events`. Rings: :mod:`.cells`. Where a scan ends and the next begins: :mod:`.segments`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ..schedule import AFTER, BEFORE, TRANSFERS, Schedule
from .cells import Cells, allocate
from .events import Events, events_of
from .segments import cuts


@dataclass(frozen=True)
class Instruction:
    """One line of a scan's body.

    Attributes:
        op: "run" a pass where the table says so, "permute" or "keep" what passes of this slot made, "start" or "done"
            of a collective.
        name: the pass kind or the collective's name.
        chunk: which of a device's stages, for F, B and W.
        slot: the slot of the interval it stands in.
        pairs: source and target devices of a permute.
        tables: ``microbatch`` and the ring cells it touches, int32 ``[intervals, p]``, -1 where there is none.
        due: of a permute, the slot of the interval before whose passes the first of its arrivals must be in the inbox,
            or the interval's length where all are read in later intervals.
    """

    op: str
    name: str
    chunk: int
    slot: int
    pairs: tuple[tuple[int, int], ...] = ()
    tables: dict[str, np.ndarray] = field(default_factory=dict, compare=False)
    due: int = -1


@dataclass(frozen=True)
class Segment:
    """One scan: where it begins, its length in intervals, its body."""

    first_interval: int
    intervals: int
    body: tuple[Instruction, ...]


@dataclass(frozen=True)
class Program:
    """The lowered schedule. ``peaks`` counts, for every ring and device, the cells alive at once."""

    schedule: Schedule
    segments: tuple[Segment, ...]
    peaks: dict[str, tuple[int, ...]]

    @cached_property
    def rings(self) -> dict[str, int]:
        """Cells to allocate for every ring: one program has one shape, so the fullest device decides."""
        return {ring: max(counts) for ring, counts in self.peaks.items()}

    @property
    def in_flight(self) -> tuple[int, ...]:
        """Activations of a stage alive at once, by device: from F to B, or to W where that is a pass of its own."""
        return self.peaks.get("kept", self.peaks.get("residual", (0,) * self.schedule.p))


def lower(schedule: Schedule) -> Program:
    """The program of a schedule.

    Raises:
        ValueError: a value is used before it is there, or never made, or never used.
    """
    events = events_of(schedule)
    cells = allocate(schedule, events)
    lines = _Lines(schedule, events)
    segments = [
        _segment(schedule, events, cells, lines, a, b)
        for a, b in cuts(schedule.p, lines.interval, lines.identity, lines.pair)
    ]
    return Program(schedule, tuple(s for s in segments if s.body), cells.peaks)


class _Lines:
    """For every event: its interval, the instruction it belongs to, and its pair where it is sent."""

    def __init__(self, schedule: Schedule, events: Events):
        K, p = schedule.interval, schedule.p
        # C0 opens the interval, so that no broadcast is cut by the end of a scan step.
        opens = next(
            (s.at[0] for s in schedule.vocabulary.steps if (s.op, s.name, s.place) == ("start", "C0", BEFORE)), 0
        )
        base = opens + (events.slot.min() - opens) // K * K
        self.interval, self.slot = np.divmod(events.slot - base, K)
        self.until = K * (self.interval + 1) + base
        moved = events.rank == TRANSFERS
        kept = events.op == events.code("keep")
        chunks = np.array([schedule.chunk(s) for s in range(schedule.stages)] + [0])
        parts = (
            (self.slot, K),
            (events.rank, AFTER + 1),
            (events.order, len(schedule.vocabulary.steps) + 1),
            (np.where(moved, ~kept, events.op), len(events.words)),
            (np.where(moved, 0, events.name), len(events.words)),
            (np.where(moved, 0, chunks[events.stage]), schedule.chunks),
        )
        self.identity = np.ravel_multi_index([x for x, _ in parts], [n for _, n in parts])
        self.pair = np.where(events.op == events.code("send"), (self.slot * p + events.device) * p + events.peer, -1)


def _segment(schedule: Schedule, events: Events, cells: Cells, lines: _Lines, a: int, b: int) -> Segment:
    """One scan over intervals ``a .. b-1``: the union of what they need, in the order of identities."""
    inside = np.flatnonzero((lines.interval >= a) & (lines.interval < b))
    inside = inside[np.argsort(lines.identity[inside], kind="stable")]
    groups = np.split(inside, np.flatnonzero(np.diff(lines.identity[inside])) + 1) if len(inside) else []
    body: list[Instruction] = []
    for rows in groups:
        slot = int(lines.slot[rows[0]])
        op, name = (events.words[codes[rows[0]]] for codes in (events.op, events.name))
        tables = _Tables(schedule.p, events, cells, lines.interval - a, b - a)
        if op in ("send", "recv"):
            body += _permutes(schedule, events, cells, lines, rows, tables, slot)
        elif op == "keep":
            body.append(Instruction("keep", "", 0, slot, (), tables(rows)))
        else:
            chunk = schedule.chunk(events.stage[rows[0]]) if events.stage[rows[0]] >= 0 else 0
            body.append(Instruction(op, name, chunk, slot, (), tables(rows)))
    return Segment(a, b - a, tuple(body))


@dataclass(frozen=True)
class _Tables:
    """Makes an instruction's tables from the rows of its events."""

    p: int
    events: Events
    cells: Cells
    interval: np.ndarray
    intervals: int

    def __call__(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        named = {"microbatch": self.events.microbatch} | self.cells.tables
        tables = {}
        for name, values in named.items():
            if name == "microbatch" or (values[rows] >= 0).any():
                table = tables[name] = np.full((self.intervals, self.p), -1, np.int32)
                table[self.interval[rows], self.events.device[rows]] = values[rows]
        return tables


def _permutes(
    schedule: Schedule, events: Events, cells: Cells, lines: _Lines, rows: np.ndarray, tables: _Tables, slot: int
) -> list[Instruction]:
    """As few permutes as hold a slot's transfers with no device the source, or the target, of two pairs."""
    p = schedule.p
    arrivals = rows[events.op[rows] == events.code("recv")]
    pair_of = events.peer[arrivals] * p + events.device[arrivals]
    pairs = sorted((divmod(x, p) for x in np.unique(pair_of).tolist()), key=lambda x: ((x[1] - x[0]) % p, x))
    merged: list[list[tuple[int, int]]] = []
    for pair in pairs:
        for group in merged:
            if all(pair[0] != s and pair[1] != t for s, t in group):
                group.append(pair)
                break
        else:
            merged.append([pair])
    instructions = []
    for group in merged:
        mine = arrivals[np.isin(pair_of, [s * p + t for s, t in group])]
        wait = np.minimum(cells.due[mine], lines.until[mine]) - events.slot[mine]
        instructions.append(
            Instruction("permute", "", 0, slot, tuple(sorted(group)), tables(mine), slot + int(wait.min()))
        )
    return instructions
