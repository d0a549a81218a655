"""Lowering: from a schedule to one program that every device runs.

The program is a few scans over intervals of ``K`` slots. Their bodies are straight lists of instructions, the same on
every device; tables say for which microbatch, if any, a device runs one, and which cell of which ring buffer it uses.
The executor compiles this list and the simulator times it, so what is simulated is what runs.

Order inside a slot: see :mod:`.events`. Which transfers share an instruction: :mod:`.permutes`. Rings: :mod:`.cells`.
Where a scan ends and the next begins: :mod:`.segments`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from ..schedule import AFTER, DEFERRED, PASSES, TRANSFERS, Order, Schedule
from .cells import Cells, allocate
from .events import Events, events_of
from .permutes import Transfer, permutes
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

    @property
    def instructions(self) -> int:
        """Instructions of all segments' bodies."""
        return sum(len(segment.body) for segment in self.segments)

    @cached_property
    def open_transfers(self) -> int:
        """Permutes that have left and not landed, at most: every device allocates two buffers for each."""
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
    scans = scan_bounds(schedule.p, lines.interval, lines.identity, lines.pair, order.ends_apart, order.windows)
    segments = [_Body(schedule, events, cells, lines, a, b).segment() for a, b in scans]
    return Program(schedule, tuple(s for s in segments if s.body), cells.peaks)


class _Lines:
    """For every event: its interval, its chunk, the instruction it belongs to, and its pair where it is sent."""

    def __init__(self, schedule: Schedule, events: Events, order: Order):
        K, p = schedule.interval, schedule.p
        self.schedule, self.events = schedule, events
        self.interval, self.slot = np.divmod(events.slot - events.base, K)
        self.by_pass, self.order = order.transfers != "behind slots", order
        by_pass = self.by_pass & (self.interval >= order.windows)
        moved = (events.rank == TRANSFERS) | (events.rank == DEFERRED)
        self.behind_pass = behind_pass = (events.rank == TRANSFERS) & by_pass
        kept = events.op == events.code("keep")
        self.chunk = chunk = schedule.chunks_of(events.stage)
        kinds = order.ranks(K, events.words, schedule.chunks)
        inside = np.where((events.rank == PASSES) | behind_pass, kinds[self.slot, events.name, chunk], events.order)
        merged = (events.rank == TRANSFERS) & ~by_pass
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
        """The scan: before every line of groups the permutes that leave there, and then the landings."""
        before: dict[int, list[Instruction]] = {}
        landings: dict[int, list[Instruction]] = {}
        for number, (at, due, leaves, lands) in enumerate(self._permutes()):
            before.setdefault(at, []).append(replace(leaves, transfer=number))
            landings.setdefault(due, []).append(replace(lands, transfer=number))
        body: list[Instruction] = []
        for n in range(len(self.groups) + 1):
            body += before.get(n, []) + landings.get(n, [])
            if n < len(self.groups) and not self._moves(n):
                body.append(self._instruction(n))
        return Segment(self.a, self.b - self.a, tuple(body))

    def _moves(self, n: int) -> bool:
        """Whether a line of groups is of transfers."""
        return self.events.words[self.events.op[self.groups[n][0]]] in ("send", "recv")

    def _slot(self, n: int) -> int:
        """The slot of a line of groups, or the interval's last behind them all."""
        return int(self.lines.slot[self.groups[n][0]]) if n < len(self.groups) else self.schedule.interval - 1

    def _instruction(self, n: int) -> Instruction:
        """What a line of groups other than of transfers becomes."""
        events, rows = self.events, self.groups[n]
        op, name, stage = events.words[events.op[rows[0]]], events.words[events.name[rows[0]]], events.stage[rows[0]]
        if op == "keep":
            name, stage = "", -1
        chunk = self.schedule.chunk(stage) if stage >= 0 else 0
        return Instruction(op, name, chunk, self._slot(n), (), self._tables(rows))

    def _permutes(self) -> Iterator[tuple[int, int, Instruction, Instruction]]:
        """For every permute the line before which it leaves, the one before which it lands, and both instructions."""
        rows_of: dict[Transfer, np.ndarray] = {}
        for n in filter(self._moves, range(len(self.groups))):
            rows_of |= self._transfers(n)
        by_pass = self.lines.by_pass and self.a >= self.lines.order.windows
        for at, due, transfers in permutes(rows_of, self.lines.order.merged if by_pass else None):
            rows = np.concatenate([rows_of[transfer] for transfer in transfers])
            arrivals = rows[self.events.op[rows] == self.events.code("recv")]
            leaving = rows[self.events.op[rows] == self.events.code("send")]
            pairs = tuple(sorted((transfer.source, transfer.target) for transfer in transfers))
            maker = self._maker(rows) if by_pass else ("", 0)
            lands = self._tables(arrivals)
            leaves = lands | self._tables(leaving, ("outbox",))
            lands.pop("outbox", None)
            yield (
                at,
                due,
                Instruction("permute", *maker, self._slot(at - 1), pairs, leaves),
                Instruction("land", *maker, self._slot(due), pairs, lands),
            )

    def _maker(self, rows: np.ndarray) -> tuple[str, int]:
        """The kind and chunk of the pass that makes what is moved, or ("", 0) if several do."""
        names, chunks = self.events.name[rows], self.lines.chunk[rows]
        if (names != names[0]).any() or (chunks != chunks[0]).any():
            return "", 0
        return self.events.words[names[0]], int(chunks[0])

    def _transfers(self, n: int) -> dict[Transfer, np.ndarray]:
        """The transfers of a line, in the order in which they share permutes, with the rows of their events."""
        p, events, rows = self.schedule.p, self.events, self.groups[n]
        arrives = events.op[rows] == events.code("recv")
        ends = (
            np.where(arrives, events.peer[rows], events.device[rows]),
            np.where(arrives, events.device[rows], events.peer[rows]),
        )
        pair_of, found = ends[0] * p + ends[1], {}
        for pair in np.unique(pair_of[arrives]).tolist():
            source, target = divmod(pair, p)
            due = int(self._due(rows[arrives & (pair_of == pair)]).min())
            until = n + 1
            if self.lines.order.transfers == "before passes" and self.lines.behind_pass[rows[0]]:
                until = min(due, self._busy(source, n), self._busy(target, n))
            found[Transfer(source, target, until, due, n)] = rows[pair_of == pair]
        return dict(sorted(found.items(), key=lambda x: ((x[0].target - x[0].source) % p, x[0])))

    def _busy(self, device: int, n: int) -> int:
        """The first line behind another in which a device runs something or waits for a collective."""
        lines = self._busy_lines[device]
        at = np.searchsorted(lines, n)
        return int(lines[at]) if at < len(lines) else len(self.groups)

    @cached_property
    def _busy_lines(self) -> list[np.ndarray]:
        """For every device the lines in which it runs something or waits for a collective, in any interval."""
        rows = np.concatenate(self.groups)
        rows = rows[np.isin(self.events.op[rows], [self.events.code("run"), self.events.code("done")])]
        return [np.unique(self.line_of[rows[self.events.device[rows] == d]]) for d in range(self.schedule.p)]

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
