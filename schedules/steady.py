"""When the passes of a building block run in the steady state, given their durations.

A block fixes the cyclic order in which every device runs its passes. Given durations, start times in the steady state
are a solution of difference constraints: a pass starts after the previous one on its device has ended and its input has
arrived, ``i`` intervals later for microbatch ``i``. Among the many solutions, the best leaves every transfer as much
time as possible, because in one program for all devices the two ends of a transfer wait for each other. :func:`steady`
finds the shortest interval, then the longest transfers that do not lengthen it, and spaces the passes as if transfers
took that long. Transfers towards the last device may be given more of that time than those towards the first. The last
devices then start intervals later. By then, the first have little left of their warm-up, in which their intervals are
shorter and they have to wait.

:func:`refined` puts the block on a grid of slots that follows these times. All of its other properties stay: the order
of passes on every device, and hence the microbatches in flight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from .blocks import Block

KINDS = ("F", "B", "W")
_ROUNDS = 24  # bisection steps: the interval and the spread are exact to one part in ten million


@dataclass(frozen=True)
class Steady:
    """The steady state of a block.

    Attributes:
        block: the block.
        interval: time from one microbatch to the next.
        spread: time available to a transfer beyond its duration, on average over both directions.
        start, end: of microbatch 0's passes, by kind, ``[stages]``.
        lean: share of the spread that is moved from transfers towards the first device to those towards the last.
    """

    block: Block
    interval: float
    spread: float
    start: Mapping[str, np.ndarray]
    end: Mapping[str, np.ndarray]
    lean: float = 0.0


def steady(
    block: Block, durations: Mapping[str, np.ndarray], transfer: float = 0.0, leans: Sequence[float] = (0.0,)
) -> list[Steady]:
    """The steady states with the shortest interval and, given that, the most time for transfers.

    Args:
        block: with passes of one slot each.
        durations: of F, B and, if present, W, ``[stages]``.
        transfer: time of a transfer between neighbors.
        leans: shares of that time to move from transfers towards the first device to those towards the last, beginning
            with 0; one without a solution is left out.
    """
    constraints = _Constraints(block, durations)
    load = np.zeros(block.p)
    for times in constraints.durations.values():
        np.add.at(load, np.array(block.placement), times)
    interval = _least(lambda T: constraints.solve(T, transfer), load.max(), 4.0 * load.max())
    slack = _least(lambda x: constraints.solve(interval, transfer + interval - x), 0.0, interval)
    spread, found = interval - slack, []
    for lean in leans:
        # Summed in this order, 0 rounds as in the bisection and so has a solution.
        times = constraints.solve(interval, transfer + interval - slack, lean * spread)
        if times is not None:
            start = constraints.by_kind(times)
            end = {kind: start[kind] + constraints.durations[kind] for kind in start}
            found.append(Steady(block, interval, spread, start, end, lean))
    return found


def _least(solve, low: float, high: float) -> float:
    """The least number from ``low`` to ``high`` that has a solution; ``high`` has one."""
    if solve(low) is not None:
        return low
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        low, high = (middle, high) if solve(middle) is None else (low, middle)
    return high


class _Constraints:
    """``start[to] >= start[at] + takes - later * interval``, with the requested extra time for transfers."""

    def __init__(self, block: Block, durations: Mapping[str, np.ndarray]):
        self.block = block
        self.durations = {kind: np.asarray(durations[kind], float) for kind in KINDS if getattr(block, kind)}
        self.nodes = [(kind, stage) for kind in self.durations for stage in range(len(block.placement))]
        self.index = {node: n for n, node in enumerate(self.nodes)}
        edges = [*self._orders(), *self._inputs()]
        at, to, later, self.moves = (np.array(column) for column in zip(*edges, strict=True))
        self.at, self.to, self.later = at, to, later
        self.takes = np.concatenate([self.durations[kind] for kind in self.durations])[at]
        device = np.array([block.placement[stage] for _, stage in self.nodes])
        self.leans = np.sign(device[to] - device[at]) * self.moves

    def _orders(self):
        """Every device runs its passes one after the other, and then those of the next microbatch."""
        K, placement = self.block.interval, self.block.placement
        starts = {node: getattr(self.block, node[0])[node[1]] for node in self.nodes}
        for d in range(self.block.p):
            mine = sorted((node for node in self.nodes if placement[node[1]] == d), key=lambda node: starts[node] % K)
            for a, b in zip(mine, mine[1:] + mine[:1], strict=True):
                later = starts[a] // K - starts[b] // K + (b == mine[0])
                yield self.index[a], self.index[b], later, False

    def _inputs(self):
        """F waits for the stage before, B for the stage after, W for its B."""
        placement = self.block.placement
        for kind, stage in self.nodes:
            source = {"F": ("F", stage - 1), "B": ("B", stage + 1), "W": ("B", stage)}[kind]
            if kind == "B" and source not in self.index:
                source = ("F", stage)
            if source in self.index:
                yield self.index[source], self.index[kind, stage], 0, placement[source[1]] != placement[stage]

    def solve(self, interval: float, transfer: float, lean: float = 0.0) -> np.ndarray | None:
        """The earliest start times by node, or None if there are none: longest paths by relaxation.

        Transfers towards the last device take ``lean`` more, those towards the first ``lean`` less.
        """
        weight = self.takes + transfer * self.moves + lean * self.leans - interval * self.later
        times, tiny = np.zeros(len(self.nodes)), 1e-9 * interval
        for _ in range(len(self.nodes) + 1):
            later = times.copy()
            np.maximum.at(later, self.to, times[self.at] + weight)
            if (later <= times + tiny).all():
                return later
            times = later
        return None

    def by_kind(self, times: np.ndarray) -> dict[str, np.ndarray]:
        """Times of nodes as ``[stages]`` for every kind."""
        return dict(zip(self.durations, times.reshape(len(self.durations), -1), strict=True))


@dataclass(frozen=True)
class Refined:
    """A block on a finer grid.

    Attributes:
        block: the block.
        fraction: of its slot at which every pass ends, or starts, by kind, ``[stages]``.
        lean: of its steady state.
    """

    block: Block
    fraction: Mapping[str, np.ndarray]
    lean: float = 0.0

    @cached_property
    def passes(self) -> dict[int, tuple[tuple[str, int], ...]]:
        """For every slot of the block's interval, the kinds and chunks of its passes, by end time."""
        ends: dict[int, dict[tuple[str, int], list[float]]] = {}
        chunks = _chunks(self.block.placement)
        for kind, fractions in self.fraction.items():
            for stage, slot in enumerate(getattr(self.block, kind)):
                of_slot = ends.setdefault(slot % self.block.interval, {})
                of_slot.setdefault((kind, chunks[stage]), []).append(float(fractions[stage]))
        return {
            slot: tuple(sorted(kinds, key=lambda kind: (np.mean(kinds[kind]), kind))) for slot, kinds in ends.items()
        }

    def turned(self, slots: int) -> Refined:
        """The same block with intervals that open so many slots earlier."""
        block, K = self.block, self.block.interval
        later = {kind: np.array(getattr(block, kind)) + slots for kind in self.fraction}
        first = min(int(of_kind.min()) for of_kind in later.values()) // K * K
        return replace(
            self, block=replace(block, **{kind: tuple((times - first).tolist()) for kind, times in later.items()})
        )


def _chunks(placement: tuple[int, ...]) -> list[int]:
    return [placement[:stage].count(device) for stage, device in enumerate(placement)]


def refined(found: Steady, K: int, rounding: float, by_start: bool = False) -> Refined | None:
    """The block on a grid of ``K`` slots per interval, every pass in the slot in which it ends, or starts.

    With ``rounding`` near 1, the slot of the last stage's F ends with it; with 0.5, half a slot later. None if two
    passes of a device would share a slot.
    """
    block = found.block
    at = found.start if by_start else found.end
    when = {kind: (times - at["F"][-1]) * K / found.interval + rounding for kind, times in at.items()}
    slots = {kind: np.floor(times + 1e-9).astype(int) for kind, times in when.items()}
    first = min(int(of_kind.min()) for of_kind in slots.values()) // K * K
    taken = np.array([of_kind % K + K * np.array(block.placement) for of_kind in slots.values()])
    if len(np.unique(taken)) < taken.size:
        return None
    longest = max(float((found.end[kind] - found.start[kind]).max()) for kind in found.end)
    return Refined(
        replace(
            block,
            interval=K,
            backward_slots=1,
            pass_slots=int(np.ceil(longest * K / found.interval - 1e-6)),
            **{kind: tuple((of_kind - first).tolist()) for kind, of_kind in slots.items()},
        ),
        {kind: when[kind] - slots[kind] for kind in slots},
        found.lean,
    )
