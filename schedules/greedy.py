"""List scheduling: every pass of a block as early as its inputs and the block's own memory allow.

Works in unit slots of real time: in every slot, each device runs the first pass, in a fixed order of kinds, that is
ready and fits into memory. The memory bounds are those of the repeated block: for every stage the microbatches between
F and B, and between F and W; for every device the cells of each ring. The broadcast of the last stage's output opens an
interval as soon as the last F is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from .blocks import Block

F, B, W = 0, 1, 2
SHORTEST = 2  # slots of an interval with a hidden_broadcast: one hides the broadcast, one the softmax reduction


@dataclass(frozen=True)
class Bounds:
    """What the repeated block holds: per stage, and per ring on the fullest device."""

    block: Block

    def _lifetimes(self, begin: Sequence[int], end: Sequence[int]) -> np.ndarray:
        return np.array([-(-(b + 1 - a) // self.block.interval) for a, b in zip(begin, end, strict=True)])

    def _peak(self, begin: Sequence[int], end: Sequence[int]) -> int:
        alive = np.zeros((self.block.p, self.block.interval), int)
        for a, b, d in zip(begin, end, self.block.placement, strict=True):
            np.add.at(alive[d], np.arange(a, b + 1) % self.block.interval, 1)
        return int(alive.max())

    @cached_property
    def until_B(self) -> np.ndarray:
        """Microbatches of a stage between F and B."""
        return self._lifetimes(self.block.F, self.block.B)

    @cached_property
    def until_W(self) -> np.ndarray:
        """Microbatches of a stage between F and W."""
        return self._lifetimes(self.block.F, self.block.W)

    @cached_property
    def rings(self) -> tuple[int, int, int]:
        """Cells of the rings residual, kept and carried."""
        block = self.block
        return self._peak(block.F, block.B), self._peak(block.F, block.W), self._peak(block.B, block.W)


@dataclass
class Greedy:
    """One run of the list scheduler.

    Attributes:
        block: with room for the vocabulary passes; F, B and W take one slot each.
        m: microbatches.
        released: slots from a microbatch's hidden_broadcast to the end of its grad_sum; None if nothing is sharded.
        opened: after the run, the first slot of every interval.
        broadcast: after the run, the interval that each microbatch's hidden_broadcast opens.
        slots: after the run, the slots it took.
    """

    block: Block
    m: int
    released: int | None
    opened: list[int] = field(default_factory=lambda: [0])
    broadcast: list[int] = field(default_factory=list)
    slots: int = 0

    def __post_init__(self) -> None:
        p, stages = self.block.p, len(self.block.placement)
        self.device = np.array(self.block.placement)
        self.stage_of = np.stack([np.flatnonzero(self.device == d) for d in range(p)], axis=1)  # [chunks, p]
        self.done = np.zeros((3, stages), int)  # passes done before this slot, by kind and stage
        self.released_B = 0

    def run(self, ranks: Sequence[int], bounds: Bounds, limit: int) -> dict[int, np.ndarray] | None:
        """Start slots ``[stages, m]`` by kind, or None if the order deadlocks or exceeds the limit.

        ``ranks`` gives the priority of every (kind, chunk), in order, when several are ready: lower goes first.
        """
        taken: list[np.ndarray] = []
        passes = np.concatenate([kind * len(self.device) + self.stage_of for kind in (F, B, W)])  # [kinds x chunks, p]
        by_rank = passes[np.argsort(ranks)]
        devices = np.arange(self.block.p)
        done, everything = self.done.reshape(-1), 3 * self.m * len(self.device)
        while everything:
            self._open_interval()
            rows = self._ready(bounds).reshape(-1)[by_rank]
            runs = by_rank[rows.argmax(axis=0), devices]
            chosen = np.where(rows.any(axis=0), runs, -1)
            done[chosen[chosen >= 0]] += 1
            everything -= int((chosen >= 0).sum())
            taken.append(chosen)
            self.slots += 1
            if self.slots > limit:
                return None
        history = np.stack(taken)
        slots, where = np.nonzero(history >= 0)
        order = np.lexsort((slots, history[slots, where]))
        starts = slots[order].reshape(3, len(self.device), self.m)
        return dict(zip((F, B, W), starts, strict=True))

    def _open_interval(self) -> None:
        """Begin an interval if a broadcast can start, if the last one is full, or to reach the last barrier."""
        if self.released is None:
            return
        t, age = self.slots, self.slots - self.opened[-1]
        waits = len(self.broadcast) < self.m and self.done[F, -1] > len(self.broadcast)
        draining = len(self.broadcast) == self.m and self.released_B < self.m
        if age >= self.block.interval or (age >= SHORTEST and (waits or draining)):
            self.opened.append(t)
            if waits:
                self.broadcast.append(len(self.opened) - 1)
        while self.released_B < len(self.broadcast) and self._is_released(self.broadcast[self.released_B]):
            self.released_B += 1

    def _is_released(self, interval: int) -> bool:
        later, slot = divmod(self.released, self.block.interval)
        last = len(self.opened) - 1
        return last > interval + later or (last == interval + later and self.slots > self.opened[last] + slot)

    def _ready(self, bounds: Bounds) -> np.ndarray:
        """Which passes have their inputs and their memory, by kind and stage."""
        done = self.done
        residual, kept, carried = bounds.rings
        ready = np.empty(done.shape, bool)
        ready[F] = (done[F] < np.r_[self.m, done[F, :-1]]) & (done[F] - done[W] < bounds.until_W)
        ready[F] &= done[F] - done[B] < bounds.until_B
        ready[F] &= self._room(W, kept) & self._room(B, residual)
        ready[B] = done[B] < np.r_[done[B, 1:], done[F, -1] if self.released is None else self.released_B]
        ready[B] &= (self._by_device(done[B] - done[W]) < carried)[self.device]
        ready[W] = done[W] < done[B]
        return ready

    def _room(self, frees: int, cells: int) -> np.ndarray:
        """Stages for which a ring has room, where an early chunk leaves some for later ones, which free it again."""
        held = (self.done[F] - self.done[frees])[self.stage_of]
        empty = held == 0
        reserved = np.cumsum(empty[::-1], axis=0)[::-1] - empty
        room = np.empty(len(self.device), bool)
        room[self.stage_of] = cells - held.sum(axis=0) - reserved > 0
        return room

    def _by_device(self, count: np.ndarray) -> np.ndarray:
        return count[self.stage_of].sum(axis=0)
