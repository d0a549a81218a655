"""Every event of a schedule as columns of numbers, so that the largest schedules lower in seconds.

An event is what one device does at one place for one microbatch: a pass, one end of a transfer, or a step of the
vocabulary layers. Places are ordered inside a slot: transfers deferred from the interval before; steps before the
passes; the passes whose last slot it is (a pass of two slots is in its second, so that no transfer of the first waits
for it); landings of collectives; transfers of what those passes made; steps after them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..instructions import KINDS
from ..schedule import DEFERRED, PASSES, TRANSFERS, Order, Schedule


@dataclass(frozen=True)
class Events:
    """One row an event, by device and then in the order in which the device comes to them.

    Attributes:
        device, slot, rank, order: where and when; ``rank`` inside the slot, ``order`` inside the rank.
        op, name: indices into ``words``.
        stage, microbatch: for what; the stage is -1 for the vocabulary layers.
        peer: the other end of a "send" or "recv", else -1.
        words: all op names and pass names, sorted, so that indices sort as the words do.
        base: the slot that opens the first interval.
    """

    device: np.ndarray
    slot: np.ndarray
    rank: np.ndarray
    order: np.ndarray
    op: np.ndarray
    name: np.ndarray
    stage: np.ndarray
    microbatch: np.ndarray
    peer: np.ndarray
    words: tuple[str, ...]
    base: int

    def __len__(self) -> int:
        return len(self.device)

    def code(self, word: str) -> int:
        """The index of a word, or -1 where no event has it."""
        return self.words.index(word) if word in self.words else -1

    def are(self, *pairs: tuple[str, str]) -> np.ndarray:
        """Which events are one of these (op, name)."""
        found = np.zeros(len(self), bool)
        for op, name in pairs:
            found |= (self.op == self.code(op)) & (self.name == self.code(name))
        return found

    def describe(self, row: int) -> str:
        """An event in words, for messages."""
        stage = f" of stage {self.stage[row]}," if self.stage[row] >= 0 else " of"
        return (
            f"device {self.device[row]}: {self.words[self.op[row]]} {self.words[self.name[row]]}{stage} "
            f"microbatch {self.microbatch[row]} in slot {self.slot[row]}"
        )


def events_of(schedule: Schedule, order: Order | None = None) -> Events:
    """All events of all devices, in the given order or the schedule's own."""
    order = order or schedule.order
    steps = schedule.vocabulary.steps
    words = tuple(
        sorted(
            {"run", "keep", "send", "recv", "start", "done"}
            | {s.name for s in steps}
            | {x.kind for passes in schedule.passes for x in passes}
        )
    )
    base = opening_slot(schedule)
    parts = _pass_events(schedule, order, words, base) + _step_events(schedule, words)
    columns = np.concatenate([np.stack(np.broadcast_arrays(*part)).astype(np.int32) for part in parts], axis=1)
    device, slot, rank, inside, op, name, stage, microbatch, peer = columns
    sort = np.lexsort((microbatch, stage, name, op, inside, rank, slot, device))
    return Events(*(c[sort] for c in (device, slot, rank, inside, op, name, stage, microbatch, peer)), words, base)


def opening_slot(schedule: Schedule) -> int:
    """The slot that opens the first interval, see :attr:`.Schedule.opens`."""
    steps, K, opens = schedule.vocabulary.steps, schedule.interval, schedule.opens
    first = min(
        [passes[0].last for passes in schedule.passes if passes]
        + [
            min(t for t in s.at if t is not None) + min(schedule.vocabulary.shifts if s.shifts is None else s.shifts)
            for s in steps
        ]
    )
    return opens + (first - opens) // K * K


def _pass_events(schedule: Schedule, order: Order, words: tuple[str, ...], base: int) -> list[tuple]:
    """Passes, and the transfers of what F and B make: to a neighbour, or kept where the same device reads it."""
    device = np.repeat(np.arange(schedule.p), [len(passes) for passes in schedule.passes])
    code = {word: n for n, word in enumerate(words)}
    rows = np.array(
        [(code[x.kind], x.stage, x.microbatch, x.start + x.slots - 1) for passes in schedule.passes for x in passes],
        np.int64,
    ).reshape(-1, 4)
    name, stage, microbatch, last = rows.T
    run = (device, last, PASSES, 0, words.index("run"), name, stage, microbatch, -1)
    sends = np.array([KINDS[word].sends if word in KINDS else 0 for word in words])[name]
    moved, to = sends != 0, stage + sends
    inside = (to >= 0) & (to < schedule.stages)
    peer = np.where(inside, np.array(schedule.placement)[np.where(inside, to, 0)], device)

    away = moved & (peer != device)
    K = schedule.interval
    deferred = away & order.defers(K, words, schedule.chunks)[(last - base) % K, name, schedule.chunks_of(stage)]
    deferred &= last - base >= K * order.windows
    slot = np.where(deferred, last + K - (last - base) % K, last)
    rank = np.where(deferred, DEFERRED, TRANSFERS)

    def transfer(op: str, rows: np.ndarray, at: np.ndarray, other: np.ndarray | int) -> tuple:
        other = other if isinstance(other, int) else other[rows]
        return (at[rows], slot[rows], rank[rows], 0, words.index(op), name[rows], stage[rows], microbatch[rows], other)

    return [
        run,
        transfer("keep", moved & ~away, device, -1),
        transfer("send", away, device, peer),
        transfer("recv", away, peer, device),
    ]


def _step_events(schedule: Schedule, words: tuple[str, ...]) -> list[tuple]:
    """The steps of the vocabulary layers, on every device that has a part in them, for every microbatch."""
    i = np.arange(schedule.m)
    parts = []
    for order, step in enumerate(schedule.vocabulary.steps):
        devices = np.array([d for d, at in enumerate(step.at) if at is not None], int)[:, None]
        at = np.array([at for at in step.at if at is not None], int)[:, None]
        shifts = schedule.vocabulary.shifts if step.shifts is None else step.shifts
        columns = (
            devices,
            at + np.array(shifts),
            step.place,
            order,
            words.index(step.op),
            words.index(step.name),
            -1,
            i,
            -1,
        )
        parts.append(tuple(np.ravel(c) for c in np.broadcast_arrays(*columns)))
    return parts
