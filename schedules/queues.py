"""A repeated block in real time, with one process per device that runs another pass where it would only wait.

Within the memory of the block, a device that would wait runs a forward of its first chunk early, or in the cool-down a
backward before weight gradients that nothing needs.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .blocks import Block

F, B, W = range(3)
KINDS = {"F": F, "B": B, "W": W}
Ran = tuple[int, int, int]
"""A pass: its kind, stage and microbatch."""
Starts = dict[str, np.ndarray]
"""Slots of the repeated block by kind, ``[stages, m]``."""


@dataclass(frozen=True)
class Bounds:
    """How much a device may hold, in activations of a stage: from F to B, from F to W, and from B to W."""

    residual: int
    kept: int
    carried: int


@dataclass(frozen=True)
class Filling:
    """How warm-up and cool-down are filled.

    Attributes:
        carried: how many more weight gradients than in the repeated block may wait on a device.
        patience: in the cool-down, for how much of a W a device rather waits for a B.
        backwards: whether a B may also run early where the device would wait.
    """

    carried: int = 0
    patience: float = 0.5
    backwards: bool = False


def orders_of(block: Block, starts: Starts) -> list[list[Ran]]:
    """For every device its passes in order, each a kind, a stage and a microbatch."""
    found: list[list[tuple[int, int, int, int]]] = [[] for _ in range(block.p)]
    for kind, slots in starts.items():
        for stage, device in enumerate(block.placement):
            found[device] += [(int(slot), KINDS[kind], stage, i) for i, slot in enumerate(slots[stage])]
    return [[x[1:] for x in sorted(of_device)] for of_device in found]


def held(orders: Sequence[Sequence[Ran]]) -> Bounds:
    """What the fullest device holds."""
    peaks = np.zeros(3, int)
    for order in orders:
        kinds = np.array([kind for kind, _, _ in order])
        steps = np.stack([(kinds == F) - 1 * (kinds == end) for end in (B, W)] + [(kinds == B) - 1 * (kinds == W)])
        peaks = np.maximum(peaks, np.cumsum(steps, axis=1).max(axis=1))
    return Bounds(*peaks.tolist())


class Queues:
    """One process per device, which runs its passes in order, but another one where it would only wait."""

    def __init__(
        self,
        placement: Sequence[int],
        orders: Sequence[Sequence[Ran]],
        durations: Mapping[str, np.ndarray],
        filling: Filling,
        transfer: float = 0.0,
        gap: float = 0.0,
    ):
        self.placement, self.transfer, self.gap, self.filling = placement, transfer, gap, filling
        self.orders, self.p = orders, len(orders)
        self.bounds = held(self.orders)
        self.takes = [np.asarray(durations[kind], float).tolist() for kind in KINDS]
        self.stages = len(placement)
        self.planned = self._as_soon_as_possible()

    def _inputs(self, x: Ran):
        """The passes that a pass waits for, and the delay after each."""
        kind, stage, i = x
        if kind == W:
            return (((B, stage, i), 0.0),)
        if kind == B and stage == self.stages - 1:
            return (((F, stage, i), self.gap),)
        source = stage - 1 if kind == F else stage + 1
        if source < 0:
            return ()
        far = self.placement[source] != self.placement[stage]
        return (((kind, source, i), self.transfer * far),)

    def _as_soon_as_possible(self) -> dict[Ran, float]:
        """When every pass starts if each device keeps to its order."""
        starts, ends = {}, {}
        at, free, moved = [0] * self.p, [0.0] * self.p, True
        while moved:
            moved = False
            for d, order in enumerate(self.orders):
                while at[d] < len(order):
                    x = order[at[d]]
                    inputs = self._inputs(x)
                    if any(y not in ends for y, _ in inputs):
                        break
                    starts[x] = max([free[d], *(ends[y] + wait for y, wait in inputs)])
                    free[d] = ends[x] = starts[x] + self.takes[x[0]][x[1]]
                    at[d] += 1
                    moved = True
        return starts

    def run(self) -> list[tuple[float, int, Ran]]:
        """Every pass with its start time and device, in the order in which they start."""
        limit = self.bounds.carried + self.filling.carried
        devices = [_Device(order, self.bounds) for order in self.orders]
        ends: dict[Ran, float] = {}
        taken: list[tuple[float, int, Ran]] = []
        events, left = [(0.0, d) for d in range(self.p)], sum(map(len, self.orders))

        def ready(x: Ran) -> float:
            return max((ends[y] + wait if y in ends else np.inf for y, wait in self._inputs(x)), default=0.0)

        while left:
            now, d = heapq.heappop(events)
            device = devices[d]
            if device.free > now or not device.waiting:
                continue
            x = self._choose(device, now, ready, limit)
            if x is not None:
                device.free = ends[x] = now + self.takes[x[0]][x[1]]
                device.take(x)
                taken.append((now, d, x))
                left -= 1
                heapq.heappush(events, (device.free, d))
                for reader, wait in self._readers(x):
                    heapq.heappush(events, (device.free + wait, reader))
        return taken

    def _readers(self, x: Ran) -> Iterator[tuple[int, float]]:
        """The devices that wait for a pass, and the delay after it."""
        kind, stage, _ = x
        reader = stage + (kind == F) - (kind == B)
        if kind != W and 0 <= reader < self.stages:
            yield self.placement[reader], self.transfer
        elif kind == F:
            yield self.placement[stage], self.gap

    def _choose(self, device: _Device, now: float, ready, limit: int) -> Ran | None:
        tiny = 1e-9 * max(now, 1.0)
        if not device.forwards:
            # Cool-down: a B, which others wait for, before a W.
            if device.carried < limit:
                for x in device.next_of(B):
                    if ready(x) <= now + tiny:
                        return x
            weights = next((x for x in device.next_of(W) if ready(x) <= now + tiny), None)
            if weights is not None and device.carried < limit:
                patient = now + self.filling.patience * self.takes[W][weights[1]]
                if any(ready(x) < patient for x in device.next_of(B)):
                    return None
            return weights
        x = device.waiting[0]
        if (at := ready(x)) <= now + tiny:
            return x
        until = min(at, self.planned[x]) if at < np.inf else self.planned[x]
        early = [y for y in device.next_of(F) if y[1] == device.first_stage]
        early += device.next_of(B) if self.filling.backwards else []
        for y in early:
            fits = y != x and ready(y) <= now + tiny and now + self.takes[y[0]][y[1]] <= until + tiny
            if fits and device.has_room(y, limit):
                return y
        return None


class _Device:
    """What a device holds and has yet to run, in the order of the repeated block."""

    def __init__(self, order: list[Ran], bounds: Bounds):
        self.waiting, self.bounds = _Ordered(order), bounds
        self.free, self.residual, self.kept, self.carried = 0.0, 0, 0, 0
        self.forwards = sum(kind == F for kind, _, _ in order)
        self.first_stage = min(stage for _, stage, _ in order)

    def next_of(self, kind: int) -> list[Ran]:
        """The next passes of a kind, one a stage, in order."""
        return self.waiting.next_of(kind)

    def take(self, x: Ran) -> None:
        self.waiting.remove(x)
        self.forwards -= x[0] == F
        self.residual, self.kept, self.carried = _after(x, self.residual, self.kept, self.carried)

    def has_room(self, early: Ran, limit: int) -> bool:
        """Whether this pass can go before those that precede it."""
        counts = _after(early, self.residual, self.kept, self.carried)
        for x in self.waiting:
            if counts[0] > self.bounds.residual or counts[1] > self.bounds.kept or counts[2] > limit:
                return False
            if x == early:
                return True
            counts = _after(x, *counts)
        return False


class _Ordered:
    """Passes in order, any of which can be removed."""

    def __init__(self, order: Sequence[Ran]):
        self.order, self.at, self.gone = order, 0, set()
        self.by_stage: dict[tuple[int, int], list[Ran]] = {}
        for x in reversed(order):
            self.by_stage.setdefault(x[:2], []).append(x)
        self.rank = {x: n for n, x in enumerate(order)}

    def __bool__(self) -> bool:
        return self.at < len(self.order)

    def __getitem__(self, n: int) -> Ran:
        return self.order[self.at + n]

    def __iter__(self):
        return (x for x in self.order[self.at :] if x not in self.gone)

    def next_of(self, kind: int) -> list[Ran]:
        found = [of_stage[-1] for (k, _), of_stage in self.by_stage.items() if k == kind and of_stage]
        return found if len(found) < 2 else sorted(found, key=self.rank.__getitem__)

    def remove(self, x: Ran) -> None:
        self.by_stage[x[:2]].remove(x)
        self.gone.add(x)
        while self.at < len(self.order) and self.order[self.at] in self.gone:
            self.at += 1


def _after(x: Ran, residual: int, kept: int, carried: int) -> tuple[int, int, int]:
    """What a device holds after a pass."""
    if x[0] == F:
        return residual + 1, kept + 1, carried
    return (residual - 1, kept, carried + 1) if x[0] == B else (residual, kept - 1, carried - 1)
