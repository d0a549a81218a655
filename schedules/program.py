"""Lowering: from a schedule to one program that every device runs.

The program is a few scans over intervals of ``K`` slots. Their bodies are straight lists of instructions, the same on
every device; tables say for which microbatch, if any, a device runs one, and which cell of which ring buffer it uses.
The executor compiles this list and the simulator times it, so what is simulated is what runs.

Inside a slot, in this order: steps of the vocabulary layers that stand before the passes; the passes whose last slot
it is (a pass of two slots stands in its second, so that no transfer of the first waits for it); transfers of what
those passes made; steps that stand after them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np

from .schedule import Schedule

BEFORE, PASSES, TRANSFERS, AFTER = range(4)
Place = tuple[int, int, int]  # slot, rank inside the slot, order inside the rank
Key = tuple  # names a value: what made it and for which microbatch


class Event(NamedTuple):
    """What one device does at one place, for one microbatch; ``peer`` is the other end of a transfer."""

    place: Place
    op: str
    name: str
    stage: int
    microbatch: int
    peer: int = -1


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
    """

    op: str
    name: str
    chunk: int
    slot: int
    pairs: tuple[tuple[int, int], ...] = ()
    tables: dict[str, np.ndarray] = field(default_factory=dict, compare=False)


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


def lower(schedule: Schedule) -> Program:
    """The program of a schedule.

    Raises:
        ValueError: a value is used before it is there, or never made, or two of a collective are under way at once.
    """
    events = _events(schedule)
    cells, peaks = [], {}
    for d, of_device in enumerate(events):
        touched, used = _allocate(schedule, d, of_device)
        cells.append(touched)
        for ring, count in used.items():
            peaks.setdefault(ring, [0] * schedule.p)[d] = count
    K = schedule.interval
    offset, first = _offset(schedule), min(es[0].place[0] for es in events)
    base = offset + (first - offset) // K * K
    body_of: list[dict] = [{} for _ in range((max(es[-1].place[0] for es in events) - base) // K + 1)]
    for d, (of_device, touched) in enumerate(zip(events, cells, strict=True)):
        for event, ring_cells in zip(of_device, touched, strict=True):
            interval, slot = divmod(event.place[0] - base, K)
            body_of[interval].setdefault((slot, *event.place[1:], *_identity(schedule, event)), []).append(
                (d, event, ring_cells))
    segments = tuple(_segment(schedule.p, body_of, a, b) for a, b in _cuts(schedule, body_of))
    return Program(schedule, segments, {ring: tuple(counts) for ring, counts in peaks.items()})


def _offset(schedule: Schedule) -> int:
    """The slot that opens an interval: where C0 starts, so that no broadcast is cut by the end of a scan step."""
    return next((s.at[0] for s in schedule.vocabulary.steps if (s.op, s.name, s.after) == ("start", "C0", False)), 0)


def _events(schedule: Schedule) -> list[list[Event]]:
    """Everything every device does, in order."""
    events: list[list[Event]] = [[] for _ in range(schedule.p)]
    for d, passes in enumerate(schedule.passes):
        for x in passes:
            events[d].append(Event((x.last, PASSES, 0), "run", x.kind, x.stage, x.microbatch))
            if x.kind == "W":
                continue
            to = x.stage + (1 if x.kind == "F" else -1)
            peer = schedule.placement[to] if 0 <= to < schedule.stages else d
            transfer = Event((x.last, TRANSFERS, 0), "keep", x.kind, x.stage, x.microbatch)
            if peer == d:
                events[d].append(transfer)
            else:
                events[d].append(transfer._replace(op="send", peer=peer))
                events[peer].append(transfer._replace(op="recv", peer=d))
        for order, step in enumerate(schedule.vocabulary.steps):
            if (slot := step.at[d]) is not None:
                rank = AFTER if step.after else BEFORE
                events[d] += [Event((slot + i * schedule.vocabulary.period, rank, order), step.op, step.name, -1, i)
                              for i in range(schedule.m)]
    for of_device in events:
        of_device.sort()
    return events


def _identity(schedule: Schedule, event: Event) -> tuple[str, str, int]:
    """What makes two events the same instruction; all transfers of a slot are sorted out together."""
    if event.place[1] == TRANSFERS:
        return ("keep" if event.op == "keep" else "permute", "", 0)
    return event.op, event.name, schedule.chunk(event.stage) if event.stage >= 0 else 0


# --- ring buffers ----------------------------------------------------------------------------------------------------


def _made(schedule: Schedule, d: int, e: Event) -> Iterator[tuple[str, Key]]:
    """The values that an event writes: ring and key."""
    i, first, last = e.microbatch, schedule.placement[0], schedule.placement[-1]
    match e.op, e.name:
        case ("keep" | "recv"), _:
            yield "inbox", (e.name, e.stage, i)
        case "run", "F" if schedule.trains:
            yield "residual", ("F", e.stage, i)
            if schedule.splits_backward:
                yield "kept", ("F", e.stage, i)
        case "run", "B" if schedule.splits_backward:
            yield "carried", ("B", e.stage, i)
        case ("done", "CI") | ("run", "IF") if d == first and (e.op == "done" or not _sharded(schedule)):
            yield "inbox", ("F", -1, i)
        case "run", ("G" | "H") if d == last and schedule.trains:
            yield "inbox", ("B", schedule.stages, i)
        case "done", "C0":
            yield "X", (i,)
        case "run", ("S" | "S1"):
            yield "P", (i,)


def _read(schedule: Schedule, d: int, e: Event) -> Iterator[tuple[str, Key]]:
    """The values that an event reads."""
    i, first, last = e.microbatch, schedule.placement[0], schedule.placement[-1]
    match e.op, e.name:
        case "run", "F":
            yield "inbox", ("F", e.stage - 1, i)
        case "run", "B":
            yield "inbox", ("B", e.stage + 1, i)
            yield "residual", ("F", e.stage, i)
            if schedule.splits_backward:
                yield "kept", ("F", e.stage, i)
        case "run", "W":
            yield "kept", ("F", e.stage, i)
            yield "carried", ("B", e.stage, i)
        case ("start", "C0") | ("run", "H") if d == last:
            yield "inbox", ("F", schedule.stages - 1, i)
        case ("start", "CB") | ("run", "IB") if d == first and (e.op == "start" or not _sharded(schedule)):
            yield "inbox", ("B", 0, i)
    if (e.op, e.name) in _READERS_OF_X:
        yield "X", (i,)
    if (e.op, e.name) in _READERS_OF_P or ((e.op, e.name) == ("start", "big") and _scales_late(schedule, e)):
        yield "P", (i,)


_READERS_OF_X = {("run", n) for n in ("S", "S1", "T", "G")}
_READERS_OF_P = {("run", n) for n in ("S2", "T")} | {(op, n) for op in ("start", "done") for n in ("max", "stats")}


def _scales_late(schedule: Schedule, big: Event) -> bool:
    """Whether the sum of input gradients starts before T, from what S left (Algorithm 2), and so needs S's record."""
    v = schedule.vocabulary
    return any(s.name == "T" and max(s.at) + big.microbatch * v.period >= big.place[0] for s in v.steps)


def _sharded(schedule: Schedule) -> bool:
    return any(step.name == "C0" for step in schedule.vocabulary.steps)


def _allocate(schedule: Schedule, d: int, events: list[Event]) -> tuple[list[dict[str, int]], dict[str, int]]:
    """For every event the ring cells it touches, and the cells used: an interval colouring, so never more than alive."""
    readers: dict[tuple[str, Key], list[int]] = defaultdict(list)
    for n, e in enumerate(events):
        for value in _read(schedule, d, e):
            readers[value].append(n)
    touched: list[dict[str, int]] = [{} for _ in events]
    used: dict[str, int] = defaultdict(int)
    free: dict[str, list[int]] = defaultdict(list)
    busy: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for n, e in enumerate(events):
        for ring, key in _made(schedule, d, e):
            users = readers.pop((ring, key), [])
            if not users and ring == "P":
                continue
            if not users or users[0] <= n:
                raise ValueError(f"device {d}: {e.op} {e.name} of stage {e.stage}, microbatch {e.microbatch} in slot "
                                 f"{e.place[0]} makes what {'nothing' if not users else 'an earlier pass'} uses")
            while busy[ring] and busy[ring][0][0] < n:
                heappush(free[ring], heappop(busy[ring])[1])
            if free[ring]:
                cell = heappop(free[ring])
            else:
                cell = used[ring]
                used[ring] += 1
            heappush(busy[ring], (users[-1], cell))
            touched[n]["deliver" if ring == "inbox" else ring] = cell
            for user in users:
                touched[user][ring] = cell
    if readers:
        (ring, key), users = next(iter(readers.items()))
        e = events[users[0]]
        raise ValueError(f"device {d}: {e.op} {e.name} of stage {e.stage}, microbatch {e.microbatch} needs "
                         f"{key[0]} of {key[1:]}, which nothing makes")
    return touched, used


# --- segments --------------------------------------------------------------------------------------------------------


def _signature(body: dict) -> frozenset:
    """What an interval needs: its instructions and its transfers."""
    sends = {(key[0], d, e.peer) for key, group in body.items() if key[1] == TRANSFERS for d, e, _ in group
             if e.op == "send"}
    return frozenset(sends) | frozenset(body)


def _is_periodic(schedule: Schedule) -> bool:
    starts: dict[tuple, int] = {}
    for x in (x for passes in schedule.passes for x in passes):
        zeroth = x.start - x.microbatch * schedule.interval
        if starts.setdefault((x.kind, x.stage), zeroth) != zeroth:
            return False
    return schedule.vocabulary.period == schedule.interval


def _cuts(schedule: Schedule, bodies: list[dict]) -> Iterable[tuple[int, int]]:
    """Where warm-up, steady state and cool-down begin and end, in intervals.

    A schedule that repeats one block has a single segment. Elsewhere the commonest interval is the steady state, and
    what comes before and after it gets a scan of its own, so that its transfers do not burden the steady state.
    """
    n = len(bodies)
    if _is_periodic(schedule):
        return [(0, n)]
    signatures = [_signature(b) for b in bodies]
    steady = max(Counter(signatures).items(), key=lambda x: (x[1], len(x[0])))[0]
    a = signatures.index(steady)
    b = n - signatures[::-1].index(steady)
    if all(s <= steady for s in signatures[:a]):
        a = 0
    if all(s <= steady for s in signatures[b:]):
        b = n
    return [(x, y) for x, y in ((0, a), (a, b), (b, n)) if x < y]


def _segment(p: int, bodies: list[dict], a: int, b: int) -> Segment:
    """One scan over intervals ``a .. b-1``: the union of what they need."""
    groups: dict[tuple, list] = defaultdict(list)
    for n in range(a, b):
        for key, group in bodies[n].items():
            groups[key] += [(n - a, *member) for member in group]
    instructions: list[Instruction] = []
    for key, members in sorted(groups.items()):
        slot, rank, _order, op, name, chunk = key
        if op == "permute":
            instructions += _permutes(p, slot, members, b - a)
        else:
            instructions.append(Instruction(op, name, chunk, slot, (), _tables(p, members, b - a)))
    return Segment(a, b - a, tuple(instructions))


def _tables(p: int, members: list, intervals: int) -> dict[str, np.ndarray]:
    tables = defaultdict(lambda: np.full((intervals, p), -1, np.int32))
    for n, d, event, cells in members:
        tables["microbatch"][n, d] = event.microbatch
        for ring, cell in cells.items():
            tables[ring][n, d] = cell
    return dict(tables)


def _permutes(p: int, slot: int, members: list, intervals: int) -> list[Instruction]:
    """As few permutes as hold a slot's transfers with no device the source, or the target, of two pairs."""
    pairs = sorted({(d, e.peer) for _, d, e, _ in members if e.op == "send"}, key=lambda x: ((x[1] - x[0]) % p, x))
    merged: list[list[tuple[int, int]]] = []
    for pair in pairs:
        for group in merged:
            if all(pair[0] != s and pair[1] != t for s, t in group):
                group.append(pair)
                break
        else:
            merged.append([pair])
    arrivals = [m for m in members if m[2].op == "recv"]
    return [Instruction("permute", "", 0, slot, tuple(sorted(group)),
                        _tables(p, [m for m in arrivals if (m[2].peer, m[1]) in group], intervals))
            for group in merged]
