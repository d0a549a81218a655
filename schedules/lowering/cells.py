"""Ring buffers: which event writes which value, which ones read it, and the cell it lives in meanwhile.

What every instruction writes and reads is in the table of :mod:`..instructions`. A value is alive from the event that
writes it to its last reader. Cells are given out first freed, first used, so that a ring never has more cells than
values alive at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..instructions import KINDS, RINGS, Value
from ..schedule import DEFERRED, Schedule
from .events import Events


@dataclass(frozen=True)
class Cells:
    """Where every event finds its values.

    Attributes:
        tables: for every ring (and ``deliver``: cells of the inbox that are written) the cell of each event, or -1.
        peaks: for every ring the cells used on each device.
        reader: for events that write the inbox, the event that reads it first; elsewhere -1.
    """

    tables: dict[str, np.ndarray]
    peaks: dict[str, tuple[int, ...]]
    reader: np.ndarray


def allocate(schedule: Schedule, events: Events) -> Cells:
    """The cells of every ring.

    Raises:
        ValueError: a value that nothing makes, or that is read before it is made, or that nothing reads.
    """
    tables: dict[str, np.ndarray] = {}
    peaks: dict[str, tuple[int, ...]] = {}
    reader = np.full(len(events), -1)
    writes, reads = _touched(schedule, events)
    for ring in RINGS:
        if not writes.get(ring) and not reads.get(ring):
            continue
        rows, keys = _joined(writes.get(ring, []))
        users, wanted = _joined(reads.get(ring, []))
        source = _sources(events, rows, keys, users, wanted)
        first, last = np.full(len(rows), len(events)), np.full(len(rows), -1)
        np.minimum.at(first, source, users)
        np.maximum.at(last, source, users)
        _refuse_misuse(events, ring, rows, first, last)
        used = np.flatnonzero(last >= 0)  # evaluation reads no softmax
        cells = np.full(len(rows), -1)
        cells[used], peaks[ring] = _color(schedule.p, events.device[rows[used]], rows[used], last[used])
        written = tables.setdefault("deliver" if ring == "inbox" else ring, np.full(len(events), -1, np.int32))
        written[rows] = cells
        tables.setdefault(ring, np.full(len(events), -1, np.int32))[users] = cells[source]
        if ring == "inbox":
            reader[rows] = first
    return Cells(tables, peaks, reader)


# --- what is written and read ----------------------------------------------------------------------------------------

Values = dict[str, list[tuple[np.ndarray, np.ndarray]]]  # for every ring: rows of events, and what they write or read


def _touched(schedule: Schedule, events: Events) -> tuple[Values, Values]:
    """The values that events make, and those that they need."""
    made, needed = _Values(schedule, events), _Values(schedule, events)
    for kind in KINDS.values():
        for access in kind.accesses:
            if access.when(schedule):
                values = made if access.writes else needed
                values.add(access.ring, events.are((access.op, kind.name)), access.value)
        if kind.sends:
            output = Value(kind.makes)
            made.add("inbox", events.are(("keep", kind.name), ("recv", kind.name)), output)
            made.add("outbox", events.are(("run", kind.name)) & _deferred(events, kind.name), output)
            needed.add("outbox", events.are(("send", kind.name)) & (events.rank == DEFERRED), output)
    return made.values, needed.values


def _deferred(events: Events, name: str) -> np.ndarray:
    """Which events share stage and microbatch with a deferred transfer of a kind of pass."""
    width = int(events.microbatch.max()) + 1
    key = events.stage.astype(np.int64) * width + events.microbatch
    return np.isin(key, key[events.are(("send", name)) & (events.rank == DEFERRED)])


class _Values:
    """Collects rows of events with a number for the value that each writes or reads."""

    def __init__(self, schedule: Schedule, events: Events):
        self.schedule, self.events, self.values = schedule, events, {}

    def add(self, ring: str, mask: np.ndarray, value: Value) -> None:
        stages, placement = self.schedule.stages, self.schedule.placement
        stage = self.events.stage
        if value.anchor:
            anchor = 0 if value.anchor == "first" else stages - 1
            mask = mask & np.where(stage < 0, self.events.device == placement[anchor], stage == anchor)
            stage = np.full_like(stage, anchor)
        rows = np.flatnonzero(mask)
        if len(rows):
            backward = value.direction == "backward"
            key = (backward * (stages + 2) + stage[rows] + value.offset + 1) * self.schedule.m
            self.values.setdefault(ring, []).append((rows, key + self.events.microbatch[rows]))


def _joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    rows, keys = (np.concatenate([part[n] for part in parts] or [np.zeros(0, int)]) for n in range(2))
    order = np.argsort(rows, kind="stable")
    return rows[order], keys[order]


# --- cells -----------------------------------------------------------------------------------------------------------


def _sources(events: Events, rows: np.ndarray, keys: np.ndarray, users: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """For every reader the index of the write that makes its value."""
    width = int(max(keys.max(initial=0), wanted.max(initial=0))) + 1
    made = events.device[rows].astype(np.int64) * width + keys
    needed = events.device[users].astype(np.int64) * width + wanted
    sort = np.argsort(made, kind="stable")
    at = np.searchsorted(made[sort], needed)
    missing = (at == len(made)) | (made[sort][np.minimum(at, len(made) - 1)] != needed) if len(made) else needed >= 0
    if missing.any():
        raise ValueError(f"{events.describe(users[np.argmax(missing)])} needs what nothing makes")
    return sort[at]


def _refuse_misuse(events: Events, ring: str, rows: np.ndarray, first: np.ndarray, last: np.ndarray) -> None:
    early, unread = first <= rows, (last < 0) & (ring != "P")
    if early.any():
        n = int(np.argmax(early))
        raise ValueError(f"{events.describe(first[n])} reads what only {events.describe(rows[n])} makes")
    if unread.any():
        raise ValueError(f"{events.describe(rows[np.argmax(unread)])} makes what nothing reads")


def _color(p: int, device: np.ndarray, begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    """Cells for values alive from ``begin`` to ``end`` (both included), sorted by begin, and the cells of each device.

    With first freed, first used, the n-th value of a device takes the cell that was freed (n - peak)-th.
    """
    cells, peaks = np.empty(len(begin), int), []
    bounds = np.searchsorted(device, np.arange(p + 1))
    for a, b in zip(bounds[:-1], bounds[1:], strict=True):
        begins, ends, count = begin[a:b], end[a:b], np.arange(b - a)
        peak = int((count + 1 - np.searchsorted(np.sort(ends), begins)).max(initial=0))
        cell = count.tolist()
        for n, freed in zip(range(peak, b - a), np.argsort(ends, kind="stable").tolist(), strict=False):
            cell[n] = cell[freed]
        cells[a:b] = cell
        peaks.append(peak)
    return cells, tuple(peaks)
