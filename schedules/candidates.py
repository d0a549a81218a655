"""Ways to build a schedule, among which the search (:mod:`.fit`) chooses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from typing import NamedTuple

from .late_weights import Shifts, with_shifts
from .schedule import Order, Schedule
from .steady import Refined

Maker = tuple[int, str, int]
"""A pass that makes what is transferred: its slot in the interval, kind and chunk."""


class Waiting(NamedTuple):
    """How weight gradients of the cool-down wait.

    Attributes:
        more: how many more of them on a device than in the repeated block.
        chunk: from a device's last forward of which chunk on.
        delay: as :attr:`.late_weights.Late.delay`.
    """

    more: int
    chunk: int
    delay: float


@dataclass(frozen=True)
class Candidate:
    """A way to build the schedule for any number of microbatches.

    Attributes:
        build: the schedule of so many microbatches.
        score: the lower, the better.
        instructions: of its program.
        carried: weight gradients that wait at once on a device of its program.
        grid, deferred: on which grid the block is put, and the passes whose transfers are deferred; None if on none.
        late: how its last weight gradients wait; None if they keep their slots.
    """

    build: Callable[[int], Schedule]
    score: float = inf
    instructions: int = 0
    carried: int = 0
    grid: Grid | None = None
    deferred: frozenset[Maker] = frozenset()
    late: Waiting | None = None

    def with_order(self, order: Order) -> Candidate:
        """The same in another program order."""
        return self._ordered(lambda _: order)

    def apart(self, far: int) -> Candidate:
        """The same with warm-up and cool-down in scans of their own; with 2, even if they take much more code."""
        return self._ordered(lambda order: replace(order, ends_apart=far))

    def merged(self, transfers: str, apart: int) -> Candidate:
        """The same with transfers that leave otherwise, merged if they land at most so many instructions apart."""
        return self._ordered(lambda order: replace(order, transfers=transfers, merged=apart))

    def later(self, shifts: Shifts, late: Waiting) -> Candidate:
        """The same with other slots for the weight gradients of the cool-down."""
        return replace(self, build=lambda m: with_shifts(self.build(m), shifts), late=late)

    def unrolled(self, late: int | None) -> Candidate:
        """The same with two microbatches per interval, see :func:`unrolled`."""
        return Candidate(lambda m: unrolled(self.build(m), late))

    def or_better(self, other: Candidate, least: float = 0.0) -> Candidate:
        """The other if its score is lower by more than this share, else this one."""
        return other if other.score < self.score * (1 - least) else self

    def _ordered(self, change: Callable[[Order], Order]) -> Candidate:
        def build(m: int) -> Schedule:
            schedule = self.build(m)
            return replace(schedule, order=change(schedule.order))

        return Candidate(build)


@dataclass(frozen=True)
class Grid:
    """The block on a grid of slots that follows the durations.

    Attributes:
        refined: the block.
        order: of the passes, none of whose transfers is deferred.
        build: its repetition for any number of microbatches.
        slots: how many of an interval's last slots have their transfers deferred.
        late: the passes that make those transfers.
        score: of its candidate.
    """

    refined: Refined
    order: Order
    build: Callable[[int], Schedule]
    slots: int = 0
    late: frozenset[Maker] = frozenset()
    score: float = inf

    @property
    def makers(self) -> list[Maker]:
        """The passes whose transfers can be deferred: slot, kind and chunk."""
        return [(slot, *kind) for slot, kinds in self.order.passes for kind in kinds if kind[0] != "W"]

    def candidate(self, deferred: frozenset[Maker]) -> Candidate:
        """The repetition, with some transfers deferred."""
        start = Candidate(self.build).with_order(replace(self.order, deferred=deferred))
        return replace(start, grid=self, deferred=deferred)


def order_of(grid: Refined, schedule: Schedule) -> Order:
    """The program order that follows the times at which passes end, or start."""
    K = grid.block.interval
    passes = sorted(((slot - schedule.opens) % K, kinds) for slot, kinds in grid.passes.items())
    return Order(tuple(passes), "behind passes")


def unrolled(schedule: Schedule, late: int | None) -> Schedule:
    """The schedule with two microbatches per interval: fewer transfers are cut short by an interval's end.

    Deferred are the transfers of the last ``late`` slots, or with None those of the second half that were.
    """
    K, order = schedule.interval, schedule.order
    if order.windows:
        raise ValueError("windows are intervals of one pass; two of them are not one interval")
    passes = tuple((slot + half, kinds) for half in (0, K) for slot, kinds in order.passes)
    if late is None:
        deferred = {(slot + K, kind, chunk) for slot, kind, chunk in order.deferred}
    else:
        last = [(slot, kind) for slot, kinds in passes for kind in kinds if slot >= 2 * K - late]
        deferred = {(slot, *kind) for slot, kind in last if kind[0] != "W"}
    return replace(schedule, interval=2 * K, order=replace(order, passes=passes, deferred=frozenset(deferred)))
