"""Lowering: from a schedule to one program that every device runs.

The program is a few scans over intervals of ``K`` slots. Their bodies are straight lists of instructions, the same on
every device; tables say for which microbatch, if any, a device runs one, and which cell of which ring buffer it uses.
The executor compiles this list and the simulator times it, so what is simulated is what runs.

Order inside a slot: see :mod:`.events` and :mod:`.program_order`. Rings: :mod:`.cells`. Where a scan ends and the next
begins: :mod:`.segments`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from ..schedule import AFTER, DEFERRED, PASSES, TRANSFERS, Order, Schedule
from .cells import Cells, allocate
from .events import Events, events_of
from .segments import scan_bounds


@dataclass(frozen=True)
class Instruction:
    """One line of a scan's body.

    Attributes:
        op: "run" a pass where the table says so; "keep" what the passes before it made, where the same device reads it;
            "permute" starts a transfer of it, "land" waits for that and stores it; "start" or "done" of a collective.
        name: the pass kind or the collective's name; of a permute behind a pass, that pass's.
        chunk: which of a device's stages, for F, B and W and their permutes.
        slot: its slot in the interval.
        pairs: source and target devices of a permute and its landing.
        tables: ``microbatch`` and the ring cells it touches, int32 ``[intervals, p]``, -1 where there is none.
        transfer: the number, in its body, of the transfer that a permute starts and a landing ends; -1 elsewhere.
    """

    op: str
    name: str
    chunk: int
    slot: int
    pairs: tuple[tuple[int, int], ...] = ()
    tables: dict[str, np.ndarray] = field(default_factory=dict, compare=False)
    transfer: int = -1


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

    @cached_property
    def open_transfers(self) -> int:
        """Transfers that have left and not landed, at most: every device allocates a buffer for each."""
        steps = [[(i.op == "permute") - (i.op == "land") for i in s.body] for s in self.segments]
        return max((int(np.cumsum(of_body).max()) for of_body in steps if of_body), default=0)


def lower(schedule: Schedule, order: Order | None = None) -> Program:
    """The program of a schedule, in the given order or the schedule's own.

    Raises:
        ValueError: a value is used before it is there, or never made, or never used.
    """
    order = order or schedule.order
    events = events_of(schedule, order)
    cells = allocate(schedule, events)
    lines = _Lines(schedule, events, order)
    scans = scan_bounds(schedule.p, lines.interval, lines.identity, lines.pair, order.ends_apart)
    segments = [_Body(schedule, events, cells, lines, a, b).segment() for a, b in scans]
    return Program(schedule, tuple(s for s in segments if s.body), cells.peaks)


class _Lines:
    """For every event: its interval, the instruction it belongs to, and its pair where it is sent."""

    def __init__(self, schedule: Schedule, events: Events, order: Order):
        K, p = schedule.interval, schedule.p
        self.schedule, self.events = schedule, events
        self.interval, self.slot = np.divmod(events.slot - events.base, K)
        self.by_pass, self.merged = order.transfers == "behind passes", order.merged
        moved = (events.rank == TRANSFERS) | (events.rank == DEFERRED)
        behind_pass = (events.rank == TRANSFERS) & self.by_pass
        kept = events.op == events.code("keep")
        chunk = schedule.chunks_of(events.stage)
        kinds = order.ranks(K, events.words, schedule.chunks)
        inside = np.where((events.rank == PASSES) | behind_pass, kinds[self.slot, events.name, chunk], events.order)
        merged = (events.rank == TRANSFERS) & (not self.by_pass)
        parts = (
            (self.slot, K),
            (np.where(behind_pass, PASSES, events.rank), AFTER + 1),
            (inside, max(len(schedule.vocabulary.steps) + 1, kinds.max(initial=0) + 1)),
            (np.where(moved, 1 + ~kept, 0), 3),
            (np.where(moved, 0, events.op), len(events.words)),
            (np.where(merged, 0, events.name), len(events.words)),
            (np.where(merged, 0, chunk), schedule.chunks),
        )
        self.identity = np.ravel_multi_index([x for x, _ in parts], [n for _, n in parts])
        self.pair = np.where(events.op == events.code("send"), (self.slot * p + events.device) * p + events.peer, -1)


class _Body:
    """One scan over intervals ``a .. b-1``: the union of what they need, in the order of identities."""

    def __init__(self, schedule: Schedule, events: Events, cells: Cells, lines: _Lines, a: int, b: int):
        self.schedule, self.events, self.cells, self.lines, self.a, self.b = schedule, events, cells, lines, a, b
        inside = np.flatnonzero((lines.interval >= a) & (lines.interval < b))
        inside = inside[np.argsort(lines.identity[inside], kind="stable")]
        cut = np.flatnonzero(np.diff(lines.identity[inside])) + 1
        self.groups = np.split(inside, cut) if len(inside) else []
        self.line_of = np.full(len(events), -1)
        for n, rows in enumerate(self.groups):
            self.line_of[rows] = n

    def segment(self) -> Segment:
        """The scan, with the landings of its transfers where the first instruction reads what they bring."""
        body: list[Instruction] = []
        landings: list[tuple[int, Instruction]] = []  # the line of groups that each comes before
        ends: list[int] = []  # for every line of groups, where its instructions end in the body
        for n, rows in enumerate(self.groups):
            for instruction, due in self._instructions(n, rows):
                if instruction.op == "permute":
                    instruction = replace(instruction, transfer=len(landings))
                    tables = {name: t for name, t in instruction.tables.items() if name != "outbox"}
                    landings.append((due, replace(instruction, op="land", tables=tables)))
                body.append(instruction)
            ends.append(len(body))
        starts = [0, *ends]
        for due, landing in sorted(landings, key=lambda x: (x[0], x[1].transfer), reverse=True):
            slot = self.schedule.interval - 1 if due == len(self.groups) else int(self.lines.slot[self.groups[due][0]])
            body.insert(starts[due], replace(landing, slot=slot))
        return Segment(self.a, self.b - self.a, tuple(body))

    def _instructions(self, n: int, rows: np.ndarray) -> Iterator[tuple[Instruction, int]]:
        """What a line of groups becomes, and for a permute the line before which it lands."""
        events, first = self.events, rows[0]
        slot = int(self.lines.slot[first])
        op, name = events.words[events.op[first]], events.words[events.name[first]]
        if op in ("send", "recv"):
            yield from self._permutes(n, rows, slot)
        elif op == "keep":
            yield Instruction("keep", "", 0, slot, (), self._tables(rows)), -1
        else:
            chunk = self.schedule.chunk(events.stage[first]) if events.stage[first] >= 0 else 0
            yield Instruction(op, name, chunk, slot, (), self._tables(rows)), -1

    def _permutes(self, n: int, rows: np.ndarray, slot: int) -> Iterator[tuple[Instruction, int]]:
        """As few permutes as hold a line's transfers with no device the source, or the target, of two pairs.

        Behind passes, only transfers that land at nearly the same place share one: few wait for another's reader.
        """
        p, events = self.schedule.p, self.events
        arrivals = rows[events.op[rows] == events.code("recv")]
        pair_of = events.peer[arrivals] * p + events.device[arrivals]
        due_of = self._due(arrivals)
        found = {}
        for pair in np.unique(pair_of).tolist():
            found[divmod(pair, p)] = int(due_of[pair_of == pair].min())
        groups: list[tuple[list[tuple[int, int]], int]] = []
        for pair in sorted(found, key=lambda x: ((x[1] - x[0]) % p, x)):
            for k, (group, due) in enumerate(groups):
                free = all(pair[0] != s and pair[1] != t for s, t in group)
                if free and (not self.lines.by_pass or abs(due - found[pair]) <= self.lines.merged):
                    groups[k] = ([*group, pair], min(due, found[pair]))
                    break
            else:
                groups.append(([pair], found[pair]))
        for group, due in groups:
            mine = np.isin(pair_of, [s * p + t for s, t in group])
            leaving = rows[events.op[rows] == events.code("send")]
            leaving = leaving[np.isin(events.device[leaving] * p + events.peer[leaving], pair_of[mine])]
            tables = self._tables(arrivals[mine]) | self._tables(leaving, ("outbox",))
            name, chunk = "", 0
            if self.lines.by_pass:
                name, chunk = events.words[events.name[rows[0]]], self.schedule.chunk(events.stage[rows[0]])
            yield Instruction("permute", name, chunk, slot, tuple(sorted(group)), tables), due

    def _due(self, arrivals: np.ndarray) -> np.ndarray:
        """The line before which each arrival must be in the inbox: its reader's, or the end for a later interval."""
        reader = self.cells.reader[arrivals]
        here = self.lines.interval[reader] == self.lines.interval[arrivals]
        return np.where(here, self.line_of[reader], len(self.groups))

    def _tables(self, rows: np.ndarray, names: Collection[str] = ()) -> dict[str, np.ndarray]:
        """An instruction's tables, all or those named, from the rows of its events."""
        tables = {}
        for name, values in ({"microbatch": self.events.microbatch} | self.cells.tables).items():
            if names and name not in names:
                continue
            if name == "microbatch" or (values[rows] >= 0).any():
                table = tables[name] = np.full((self.b - self.a, self.schedule.p), -1, np.int32)
                table[self.lines.interval[rows] - self.a, self.events.device[rows]] = values[rows]
        return tables
