"""The result of a simulation: what ran when on each device, and metrics derived from it.

Times are in the unit of the given durations; counts are of microbatches held by a stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ..instructions import KINDS
from ..lowering.program import Program
from ..schedule import Schedule

Curve = tuple[np.ndarray, np.ndarray]  # times, and the value from each time to the next


class Span(NamedTuple):
    """One pass on a device, transfer into it (``op`` "permute") or collective (``op`` "start") for a microbatch."""

    op: str
    kind: str
    device: int
    stage: int
    microbatch: int
    start: float
    end: float


@dataclass(frozen=True)
class Track:
    """When one instruction ran: ``start`` and ``end`` ``[intervals, p]``, valid where ``microbatch`` is not negative.

    For a transfer, the times on the receiver; for a collective (at its "start"), the time in flight. The instruction is
    ``line`` of the body of a scan that begins with ``first_interval``; ``stages`` are each device's.
    """

    op: str
    kind: str
    stages: np.ndarray
    tables: Mapping[str, np.ndarray]
    first_interval: int
    line: int
    start: np.ndarray
    end: np.ndarray

    @property
    def microbatch(self) -> np.ndarray:
        """The microbatch it ran for, ``[intervals, p]``; -1 if none."""
        return self.tables["microbatch"]


@dataclass(frozen=True)
class Timeline:
    """One simulated iteration.

    Attributes:
        program: what ran.
        tracks: when each of its instructions ran.
        finished: when each device finished, ``[p]``.
    """

    program: Program
    tracks: tuple[Track, ...] = field(repr=False)
    finished: np.ndarray

    @property
    def schedule(self) -> Schedule:
        """The schedule that was lowered."""
        return self.program.schedule

    @property
    def makespan(self) -> float:
        """Time of the whole iteration."""
        return float(self.finished.max())

    @cached_property
    def busy(self) -> np.ndarray:
        """Time that each device spends in passes, ``[p]``."""
        total = np.zeros(self.schedule.p)
        for t in self.tracks:
            if t.op == "run":
                total += ((t.end - t.start) * (t.microbatch >= 0)).sum(axis=0)
        return total

    @property
    def bubbles(self) -> np.ndarray:
        """The fraction of the iteration in which each device computes nothing, ``[p]``."""
        return 1.0 - self.busy / self.makespan

    @property
    def bubble_ratio(self) -> float:
        """The mean of :attr:`bubbles`."""
        return float(self.bubbles.mean())

    @cached_property
    def idle(self) -> np.ndarray:
        """Time that each device waits between its first and last pass, ``[p]``: the bubble of zero-bubble papers."""
        first, last = np.full(self.schedule.p, np.inf), np.zeros(self.schedule.p)
        for t in self.tracks:
            if t.op == "run":
                ran = (t.microbatch >= 0) & (t.end > t.start)
                first = np.minimum(first, np.where(ran, t.start, np.inf).min(axis=0))
                last = np.maximum(last, np.where(ran, t.end, 0.0).max(axis=0))
        return last - first - self.busy

    @property
    def longest_wait_ratio(self) -> float:
        """The largest fraction, over devices, of the time between first and last pass in which a device waits."""
        span = self.idle + self.busy
        return float(np.divide(self.idle, span, out=np.zeros_like(span), where=span > 0).max())

    def spans(self) -> Iterator[Span]:
        """Every pass, transfer and collective that carried a microbatch."""
        for t in self.tracks:
            if t.op in ("done", "land"):
                continue
            rows, devices = np.nonzero(t.microbatch >= 0)
            columns = (
                devices,
                t.stages[devices],
                t.microbatch[rows, devices],
                t.start[rows, devices],
                t.end[rows, devices],
            )
            for d, stage, i, start, end in zip(*(c.tolist() for c in columns), strict=True):
                yield Span(t.op, t.kind, d, stage, i, start, end)

    def _times(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Start and end of a pass kind, ``[stages, m]``; NaN where it does not run."""
        times = np.full((2, self.schedule.stages, self.schedule.m), np.nan)
        for t in self.tracks:
            if (t.op, t.kind) == ("run", kind):
                rows, devices = np.nonzero(t.microbatch >= 0)
                where = t.stages[devices], t.microbatch[rows, devices]
                times[0][where], times[1][where] = t.start[rows, devices], t.end[rows, devices]
        return times[0], times[1]

    @cached_property
    def steady_interval(self) -> float:
        """Time per microbatch once all devices are busy: the mean slope of the forwards' ends over all stages.

        Measured over the last p forwards of every stage in the second half of the iteration, between the first backward
        and the last forward of the first stage. If there is no such time, as in GPipe, it is the slope of the backwards
        over their middle half.
        """
        p, m = self.schedule.p, self.schedule.m
        end = self._times("F")[1]
        opens, closes = end[0, m // 2], end[0, -1]
        if self.schedule.trains:
            begins, ends = self._times("B")
            opens = max(opens, begins[0, 0])
            if np.searchsorted(end[0], opens) + 1 >= m:
                a, b = m // 4, max(m // 4 + 1, 3 * m // 4)
                return float((ends[:, b] - ends[:, a]).mean() / (b - a)) if b < m else self.makespan / m
        slopes: dict[bool, list[float]] = {True: [], False: []}  # by whether p forwards are there, a schedule's period
        for of_stage in end:
            a, b = np.searchsorted(of_stage, opens), np.searchsorted(of_stage, closes, side="right") - 1
            if b > a:
                n = min(p, b - a)
                slopes[n == p].append((of_stage[b] - of_stage[b - n]) / n)
        return float(np.mean(slopes[True] or slopes[False] or [self.makespan / m]))

    @property
    def steady_bubble(self) -> float:
        """The mean fraction of the steady interval in which a device computes nothing."""
        return float(1.0 - self.busy.mean() / self.schedule.m / self.steady_interval)

    # --- memory ------------------------------------------------------------------------------------------------------

    @cached_property
    def _held(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Device, begin and end of every activation: from the start of F to the end of B, or of W if there is one."""
        schedule = self.schedule
        begin = self._times("F")[0]
        end = self._times("W" if schedule.splits_backward else "B" if schedule.trains else "F")[1]
        devices = np.repeat(np.array(schedule.placement)[:, None], schedule.m, axis=1)
        return devices.ravel(), begin.ravel(), end.ravel()

    def in_flight(self, device: int) -> Curve:
        """Activations that a device holds over time, in microbatches of one stage."""
        return _count(device, *self._held)

    @cached_property
    def peak_in_flight(self) -> tuple[int, ...]:
        """The most activations that each device holds at once."""
        return tuple(int(self.in_flight(d)[1].max()) for d in range(self.schedule.p))

    def alive(self, ring: str, device: int) -> Curve:
        """Cells of a ring that hold something a later instruction still needs, over time."""
        if ring not in self.program.rings:
            raise ValueError(f"ring is {ring!r}; the program's rings are {', '.join(self.program.rings)}")
        return _count(device, *self._lifetimes[ring])

    def bytes(self, cell: Mapping[str, float], device: int) -> Curve:
        """Live bytes in the rings over time, given the bytes of one cell of each."""
        curves = [self.alive(ring, device) for ring in cell if ring in self.program.rings]
        times = np.unique(np.concatenate([[0.0], *(c[0] for c in curves)]))
        total = np.zeros(len(times))
        for size, (at, count) in zip((cell[r] for r in cell if r in self.program.rings), curves, strict=True):
            total += size * count[np.searchsorted(at, times, side="right") - 1]
        return times, total

    def peak_bytes(self, cell: Mapping[str, float]) -> tuple[float, ...]:
        """Peak live bytes in the rings, one number per device."""
        return tuple(float(self.bytes(cell, d)[1].max()) for d in range(self.schedule.p))

    def allocated_bytes(self, cell: Mapping[str, float]) -> float:
        """Bytes that every device allocates for the rings: all run one program, so the fullest device decides."""
        return sum(cells * cell.get(ring, 0.0) for ring, cells in self.program.rings.items())

    @cached_property
    def _lifetimes(self) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For every ring: device, begin and end of each value, from the start of its writer to its last reader."""
        touches: dict[str, list[np.ndarray]] = {ring: [] for ring in self.program.rings}
        for t in self.tracks:
            if t.op == "land":  # the cell has been in use since the transfer left
                continue
            for name, table in t.tables.items():
                ring = "inbox" if name == "deliver" else name
                if ring not in touches:
                    continue
                writes = name == "deliver" if ring == "inbox" else (t.op, t.kind, ring) in _WRITES
                rows, devices = np.nonzero(table >= 0)
                # A collective has copied its input once it is in flight.
                end = t.start if t.op == "start" else t.end
                touches[ring].append(
                    np.stack(
                        [
                            devices,
                            table[rows, devices],
                            (t.first_interval + rows) * 1e4 + t.line,
                            np.full(len(rows), writes),
                            t.start[rows, devices],
                            end[rows, devices],
                        ]
                    )
                )
        return {ring: _lives(np.concatenate(found, axis=1)) for ring, found in touches.items()}


_WRITES = {(a.op, kind.name, a.ring) for kind in KINDS.values() for a in kind.accesses if a.writes} | {
    ("run", kind.name, "outbox") for kind in KINDS.values() if kind.sends
}


def _lives(touches: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Device, begin and end of each value, from all cell accesses: device, cell, order, whether it writes, times."""
    device, cell, order, writes, start, end = touches
    by_cell = np.lexsort((order, cell, device))
    heads = np.flatnonzero(writes[by_cell])
    return device[by_cell][heads].astype(int), start[by_cell][heads], np.maximum.reduceat(end[by_cell], heads)


def _count(device: int, devices: np.ndarray, begin: np.ndarray, end: np.ndarray) -> Curve:
    """How many of a device's values are live over time; one that ends makes room for one that begins then."""
    mine = devices == device
    if not mine.any():
        return np.zeros(1), np.zeros(1, int)
    times = np.concatenate([begin[mine], end[mine]])
    steps = np.concatenate([np.ones(mine.sum(), int), -np.ones(mine.sum(), int)])
    order = np.lexsort((steps, times))
    times, counts = times[order], np.cumsum(steps[order])
    # Sums of the same durations in a different order differ in their last digits; treat them as one moment.
    last = np.append(np.diff(times) > 1e-9 * times.max(initial=0.0), True)
    return np.concatenate([[0.0], times[last]]), np.concatenate([[0], counts[last]])
