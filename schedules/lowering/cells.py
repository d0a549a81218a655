"""Ring buffers: which event writes which value, which ones read it, and the cell it lives in meanwhile.

    inbox     what arrives before its slot: streams and their gradients      X  the last stage's output, on every device
    residual  what F leaves for B        kept  what F leaves for W too       P  what S leaves for the reductions and T
    carried   what B leaves for W        outbox  what F and B leave for a transfer of the next interval

Where further tokens than the next are predicted, on the last stage's device:

    ahead     the input layer's sums, until the last stage's F     streams   what its F leaves for the output layer
    behind    their gradients from its B, until the broadcast CB   returned  the gradients of that, until its B
    tail_residual, tail_kept, tail_carried  as those of the layers

A value is alive from the event that writes it to its last reader. Cells are given out first freed, first used, so that
a ring never has more cells than values alive at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..schedule import DEFERRED, Schedule
from ..vocabulary import sums_before_T
from .events import Events

TAIL = ("ahead", "behind", "streams", "returned", "tail_residual", "tail_kept", "tail_carried")
RINGS = ("inbox", "outbox", "residual", "kept", "carried", "X", "P", *TAIL)
FORWARD, BACKWARD = 0, 1


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
    writes, reads = _written(schedule, events), _read(schedule, events)
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


def _written(schedule: Schedule, events: Events) -> Values:
    """The values that events make."""
    first, last = schedule.placement[0], schedule.placement[-1]
    sharded, on = schedule.sharded, events.device
    makes = _Values(schedule, events)
    for name, way in (("F", FORWARD), ("B", BACKWARD)):
        makes.add("inbox", events.are(("keep", name), ("recv", name)), way)
    for name, way in (("F", FORWARD), ("B", BACKWARD)):
        makes.add("outbox", events.are(("run", name)) & _deferred(events, name), way)
    if schedule.trains:
        makes.add("residual", events.are(("run", "F")), FORWARD)
        makes.add("inbox", events.are(("run", "G"), ("run", "H")) & (on == last), BACKWARD, stage=schedule.stages)
    if schedule.splits_backward:
        makes.add("kept", events.are(("run", "F")), FORWARD)
        makes.add("carried", events.are(("run", "B")), BACKWARD)
    makes.add("inbox", events.are(("done", "CI") if sharded else ("run", "IF")) & (on == first), FORWARD, stage=-1)
    makes.add("X", events.are(("done", "C0")), FORWARD)
    makes.add("P", events.are(("run", "S"), ("run", "S1")), FORWARD)
    if schedule.depths:
        F, B = (events.are(("run", kind)) & (events.stage == schedule.stages - 1) for kind in "FB")
        makes.add("ahead", events.are(("done", "CI")) & (on == last), FORWARD, stage=0)
        makes.add("streams", F, FORWARD)
        output = events.are(("run", "G"), ("run", "H")) & (on == last)
        makes.add("returned", output & schedule.trains, BACKWARD, stage=0)
        makes.add("behind", B & sharded, BACKWARD)
        makes.add("tail_residual", F & schedule.trains, FORWARD)
        makes.add("tail_kept", F & schedule.splits_backward, FORWARD)
        makes.add("tail_carried", B & schedule.splits_backward, BACKWARD)
    return makes.values


def _read(schedule: Schedule, events: Events) -> Values:
    """The values that events need."""
    first, last = schedule.placement[0], schedule.placement[-1]
    sharded, on = schedule.sharded, events.device
    reads = _Values(schedule, events)
    F, B, W = (events.are(("run", kind)) for kind in "FBW")
    for name, way in (("F", FORWARD), ("B", BACKWARD)):
        reads.add("outbox", events.are(("send", name)) & (events.rank == DEFERRED), way)
    reads.add("inbox", F, FORWARD, offset=-1)
    reads.add("inbox", B, BACKWARD, offset=1)
    reads.add("residual", B, FORWARD)
    if schedule.splits_backward:
        reads.add("kept", B | W, FORWARD)
        reads.add("carried", W, BACKWARD)
    reads.add("inbox", events.are(("start", "C0"), ("run", "H")) & (on == last), FORWARD, stage=schedule.stages - 1)
    reads.add("inbox", events.are(("start", "CB") if sharded else ("run", "IB")) & (on == first), BACKWARD, stage=0)
    reads.add("X", events.are(*(("run", name) for name in ("S", "S1", "T", "G"))), FORWARD)
    reads.add(
        "P",
        events.are(("run", "S2"), ("run", "T"), *((op, name) for op in ("start", "done") for name in ("max", "stats"))),
        FORWARD,
    )
    if sums_before_T(schedule):
        reads.add("P", events.are(("start", "big")), FORWARD)
    if schedule.depths:
        F, B, W = (x & (events.stage == schedule.stages - 1) for x in (F, B, W))
        output = events.are(("start", "C0"), ("run", "H")) & (on == last)
        reads.add("ahead", F & sharded, FORWARD, stage=0)
        reads.add("streams", output, FORWARD, stage=schedule.stages - 1)
        reads.add("returned", B, BACKWARD, stage=0)
        reads.add("behind", events.are(("start", "CB")) & (on == last), BACKWARD, stage=schedule.stages - 1)
        reads.add("tail_residual", B, FORWARD)
        reads.add("tail_kept", (B | W) & schedule.splits_backward, FORWARD)
        reads.add("tail_carried", W, BACKWARD)
    return reads.values


def _deferred(events: Events, name: str) -> np.ndarray:
    """Which events share stage and microbatch with a deferred transfer of a kind of pass."""
    width = int(events.microbatch.max()) + 1
    key = events.stage.astype(np.int64) * width + events.microbatch
    return np.isin(key, key[events.are(("send", name)) & (events.rank == DEFERRED)])


class _Values:
    """Collects rows of events with a number for the value that each writes or reads."""

    def __init__(self, schedule: Schedule, events: Events):
        self.schedule, self.events, self.values = schedule, events, {}

    def add(self, ring: str, mask: np.ndarray, way: int, *, stage: int | None = None, offset: int = 0) -> None:
        rows = np.flatnonzero(mask)
        if len(rows):
            stages = self.events.stage[rows] + offset if stage is None else np.full(len(rows), stage)
            key = (way * (self.schedule.stages + 2) + stages + 1) * self.schedule.m + self.events.microbatch[rows]
            self.values.setdefault(ring, []).append((rows, key))


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
