"""The best schedule for given durations: candidates from a building block, judged by simulating their programs.

A candidate is the block on a grid of slots that follows the durations (:mod:`.steady`) with a program order: the order
of passes inside a slot, and whether a transfer leaves behind its pass or at the beginning of the next interval. Its
warm-up and cool-down may be filled (:mod:`.ends`, :mod:`.reorder`). The block as it is, merely repeated, is one of the
candidates. :func:`.simulate` decides, by the rules of the machine that
the program is for. The search tries a fixed list of candidates in a fixed order, so it finds the same schedule
everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf

import numpy as np

from .blocks import Block
from .ends import Filling, Starts, fill
from .lowering.program import lower
from .reorder import can_reorder, reorder
from .repeat import assembled, repeat
from .schedule import Order, Schedule
from .simulation.durations import Durations
from .simulation.simulator import GPU, Rules, simulate, steady_interval
from .steady import KINDS, Refined, refined, steady
from .vocabulary import insert, unsharded

Times = Durations | Callable[[Schedule], Durations]

FINER = (1, 2, 3)  # how many times as many slots an interval as the block has
ROUNDINGS = (0.999, 0.5)
GRIDS = 2  # grids whose program orders are searched
STATS, USUAL_STATS = (1, 2, 3), 2  # slots for the softmax statistics
FILLINGS = (
    Filling(),
    Filling(backwards=True),
    Filling(carried=1, backwards=True),
    Filling(carried=2, backwards=True),
    Filling(carried=1 << 20),
    Filling(carried=1 << 20, patience=1.0),
)
TOGGLED = 8  # transfers that are deferred or not one by one
WAITING = 0.25  # what a unit of the longest wait counts, beside one of the whole iteration


@dataclass(frozen=True)
class _Candidate:
    """A way to build the schedule for any number of microbatches, and the simulated time for a few."""

    build: Callable[[int], Schedule]
    score: float = inf

    def with_order(self, order: Order) -> _Candidate:
        return _Candidate(lambda m: replace(self.build(m), order=order))


def fit(
    block: Block,
    method: str,
    m: int,
    durations: Times,
    name: str = "custom",
    *,
    rules: Rules = GPU,
    inserted: int | None = None,
    layer_counts: Sequence[int] | None = None,
) -> Schedule:
    """The schedule of a block that takes the least time, with no more microbatches in flight than the block has.

    A block without W passes is repeated as it is: its transfers have no time to spare, so there is nothing to choose.

    Args:
        block: the building block, without its vocabulary passes.
        method: the vocabulary method.
        m: microbatches.
        durations: of all passes and transfers, or what makes them for a schedule, as :meth:`.cost.Cost.durations`.
        name: of the schedule.
        rules: of the machine.
        inserted: as for :func:`.build.build`.
        layer_counts: layers of every stage, or None for an even split.

    Raises:
        ValueError: as :func:`.build.repeat` does.
    """
    counts = None if layer_counts is None else tuple(layer_counts)
    if not block.W:
        return replace(repeat(block, method, m, name, inserted), layer_counts=counts)
    search = _Search(block, method, m, durations, name, rules, inserted, counts)
    return min((search.best().build(m), search.repeated(m)), key=search.makespan)


class _Search:
    def __init__(self, block: Block, method: str, m: int, durations: Times, name, rules: Rules, inserted, counts):
        self.block, self.method, self.name, self.rules, self.inserted = block, method, name, rules, inserted
        self.counts = counts
        self.durations = durations if callable(durations) else lambda _: durations
        self.plain = self._repeated(block)(1)
        self.m, self.trial = m, min(m, 3 * block.p + 8)  # long enough for the steady state
        starts = [x.start for of_device in self.plain.passes for x in of_device]
        self.short = min(m, (max(starts) - min(starts)) // block.interval + 3)  # one interval of the steady state
        given = self.durations(self.plain)
        stages = range(self.plain.stages)
        self.takes = {
            kind: np.array([given.of(self.plain, kind, self.plain.chunk(s))[block.placement[s]] for s in stages])
            for kind in KINDS
            if getattr(block, kind)
        }
        self.transfer = float(np.max(given.transfer)) if block.p > 1 else 0.0
        self.gap = float(np.max(given.H))  # from the last stage's F to its B, where ends are filled
        self.in_flight = max(lower(self._repeated(block)(self.trial)).in_flight)

    def _repeated(self, block: Block) -> Callable[[int], Schedule]:
        return lambda m: self._counted(repeat(block, self.method, m, self.name, self.inserted))

    def _counted(self, schedule: Schedule) -> Schedule:
        return replace(schedule, layer_counts=self.counts)

    def repeated(self, m: int) -> Schedule:
        """The block as it is."""
        return self._repeated(self.block)(m)

    def makespan(self, schedule: Schedule) -> float:
        """Simulated time of the whole iteration."""
        return simulate(lower(schedule), self.durations(schedule), self.rules).makespan

    def best(self) -> _Candidate:
        """The best of all candidates."""
        plain = _Candidate(self._repeated(self.block))
        found = [self.judged(plain), self.judged(plain.with_order(Order(transfers="behind passes")))]
        found += [self.deferred(self.filled(*grid), grid[2]) for grid in self.grids()]
        if self.plain.sharded and can_reorder(self.block):
            found.append(self.judged(_Candidate(self._reordered)))
        return min(found, key=lambda candidate: candidate.score)

    def judged(self, candidate: _Candidate) -> _Candidate:
        """The candidate with its simulated time; infinite where it cannot run or holds more than the block."""
        try:
            program = lower(candidate.build(self.trial))
        except ValueError:
            return candidate
        if max(program.in_flight) > self.in_flight:
            return candidate
        timeline = simulate(program, self.durations(program.schedule), self.rules)
        more = (self.m - self.trial) * timeline.steady_interval if self.m > self.trial else 0.0
        return replace(candidate, score=timeline.makespan + more + WAITING * float(timeline.idle.max()))

    def grids(self) -> list[tuple[_Candidate, Refined, Order]]:
        """The grids with the shortest intervals, and how long their collectives may take, the best first."""
        if not self.block.B or self.block.group > 1 or self.block.interval < 2:
            return []
        found = steady(self.block, self.takes, self.transfer)
        grids = [refined(found, finer * self.block.interval, rounding) for finer in FINER for rounding in ROUNDINGS]
        sized = [self.paced(grid, grid.block.pass_slots, USUAL_STATS) for grid in grids if grid]
        best = sorted(sized, key=lambda x: x[0])[:GRIDS]
        if self.plain.sharded:
            best += [
                self.paced(grid, slots, stats)
                for _, grid, _ in best[:GRIDS]
                for slots in range(max(1, grid.block.pass_slots - 1), grid.block.pass_slots + 2)
                for stats in STATS
                if (slots, stats) != (grid.block.pass_slots, USUAL_STATS)
            ]
        best = [(self.judged(_Candidate(self._repeated(grid.block)).with_order(order)), grid, order)
                for pace, grid, order in sorted(best, key=lambda x: x[0])[:GRIDS] if order]
        return best

    def paced(self, grid: Refined, slots: int, stats: int) -> tuple[float, Refined, Order | None]:
        """The simulated interval of the block on a grid, a large collective taking so many slots."""
        if self.plain.sharded:
            grid = replace(grid, block=replace(grid.block, pass_slots=slots, stats_slots=stats))
        else:
            grid = replace(grid, block=replace(grid.block, pass_slots=1))
        build = self._repeated(grid.block)
        try:
            order = _order(grid, build(1))
            program = lower(replace(build(self.short), order=order))
        except ValueError:  # fewer intervals are inserted than its passes need
            return inf, grid, None
        return steady_interval(program, self.durations(program.schedule), self.rules), grid, order

    def filled(self, start: _Candidate, grid: Refined, order: Order) -> _Candidate:
        """A grid with the best filling of its ends, where the vocabulary is not sharded."""
        best = start
        for filling in FILLINGS if self.block.W and not self.plain.sharded else ():
            ends = _Ends(grid.block, self.takes, self.transfer, self.gap, filling)
            candidate = _Candidate(partial(self._with_ends, ends)).with_order(order)
            best = min(best, self.judged(candidate), key=lambda found: found.score)
        return best

    def _with_ends(self, ends: _Ends, m: int) -> Schedule:
        return self._counted(ends.schedule(self.method, self.name, m))

    def _reordered(self, m: int) -> Schedule:
        found = reorder(self.block, self.method, m, self.name, self.inserted)
        if found is None:
            raise ValueError("no order of passes takes fewer slots than the repeated block")
        return self._counted(found)

    def deferred(self, start: _Candidate, order: Order) -> _Candidate:
        """The candidate with some transfers deferred: those of an interval's last slots, then one more or one less."""
        slots = [slot for slot, _ in order.passes]
        makers = [(slot, *kind) for slot, kinds in order.passes for kind in kinds if kind[0] != "W"]
        best, chosen = start, frozenset()

        def tried(these: frozenset) -> None:
            nonlocal best, chosen
            candidate = self.judged(start.with_order(replace(order, deferred=these)))
            if candidate.score < best.score * (1 - 1e-9):
                best, chosen = candidate, these

        for first in slots[len(slots) // 2 :: 1 + len(slots) // 16]:
            tried(frozenset(maker for maker in makers if maker[0] >= first))
        for maker in sorted(makers, reverse=True)[:TOGGLED]:
            tried(chosen ^ {maker})
        return best


def _order(grid: Refined, schedule: Schedule) -> Order:
    """The program order that follows the times at which passes end."""
    K = grid.block.interval
    passes = sorted(((slot - schedule.opens) % K, kinds) for slot, kinds in grid.passes.items())
    return Order(tuple(passes), "behind passes")


@dataclass(frozen=True)
class _Ends:
    """How to fill the ends of a block's repetition."""

    block: Block
    takes: Mapping[str, np.ndarray]
    transfer: float
    gap: float
    filling: Filling

    def schedule(self, method: str, name: str, m: int) -> Schedule:
        """The schedule; the vocabulary is not sharded."""
        block, vocabulary = insert(self.block, method, m)
        shifts = np.array([block.shift(i) for i in range(m)])
        starts = self.starts({kind: np.array(getattr(block, kind))[:, None] + shifts for kind in KINDS})
        steps = unsharded(block.placement, starts["F"][0], starts["F"][-1], starts["B"][0])
        return assembled(block, replace(vocabulary, steps=steps), starts, name)

    def starts(self, starts: Starts) -> Starts:
        """The slots of every pass; a long iteration has the ends of a short one."""
        m, probe = starts["F"].shape[1], 4 * self.block.p + 8
        if m <= probe:
            return fill(self.block, starts, self.takes, self.transfer, self.gap, self.filling)
        short = {kind: slots[:, :probe] for kind, slots in starts.items()}
        moved = fill(self.block, short, self.takes, self.transfer, self.gap, self.filling)
        half, more = probe // 2, m - probe
        found = {}
        for kind, slots in moved.items():
            steady = slots[:, half : half + 1] + self.block.interval * np.arange(more)
            found[kind] = np.concatenate(
                [slots[:, :half], steady, slots[:, half:] + self.block.interval * more], axis=1
            )
        return found
