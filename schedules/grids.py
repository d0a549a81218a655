"""The grids of slots on which the search (:mod:`.fit`) puts a block: where passes begin and intervals open.

A grid follows the times of the block's steady state (:mod:`.steady`). The simulated time of the program that results
decides between grids.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import product

from .candidates import Grid, order_of
from .judge import Judge
from .schedule import Schedule
from .steady import Refined, Steady, refined, steady
from .windows import Windows, busy

FINER = (1, 2, 3)  # how many times as many slots an interval as the block has
ROUNDINGS = (0.999, 0.5)
NEAR, COMPARED = 0.005, 10  # grids whose steady states differ by less, at most so many, are compared as a whole
WHOLE = 2  # of those, so many are searched further
NEARLY = 0.002  # by how much the steady states of grids differ that are compared with a warm-up of windows
GRIDS = 2  # grids whose program orders are searched
FEW = 16  # devices up to which more is tried
MOST_DELAYED = 8  # candidates whose last weight gradients are delayed
DELAYED = (96, 64)  # the same times devices, and where windows are tried
LEANS = (0.0, 0.1, 0.2)  # shares of a transfer's time to spare that are moved towards the last device
V_LEANS = (0.0, 0.65, 0.7, 0.75)  # the same in a V, where they leave the first device less to wait for
BUSY = 0.9  # share of the windows until the steady state in which the first device must have a pass to run
STATS = (2, 3)  # slots for the softmax statistics
LATE = (1, 2)  # of how many of an interval's last slots the transfers are deferred, with a sharded vocabulary
DEFERRED = (1, 2)  # of how many of the block's last slots they are, without


class Grids(Judge):
    """A judge of grids, too."""

    @property
    def few(self) -> int:
        """Of how many candidates on one steady state's grids the last weight gradients are delayed, which takes longer
        the more devices there are; with more than FEW of 4, or 2 of a V."""
        if self.block.p > FEW:
            return 4 // self.plain.chunks
        return min(MOST_DELAYED, DELAYED[self.in_windows] // self.block.p)

    @property
    def many(self) -> bool:
        """Whether both ends of a transfer wait for each other, and more is tried."""
        return self.rules.transfers != "eager" and self.block.p <= FEW

    @property
    def in_windows(self) -> bool:
        """Whether the warm-up may be windows: in a V, where a microbatch passes every device twice before its B, with
        enough microbatches for a steady state behind them."""
        p, long_enough = self.block.p, self.m >= 3 * self.block.p
        return self.many and not self.plain.sharded and len(self.block.placement) > p and long_enough

    def states(self) -> list[Steady]:
        """The steady states on whose grids the block is put."""
        if not self.block.W or self.block.group > 1 or self.block.interval < 2:
            return []
        if len(self.block.placement) == self.block.p:
            leans = LEANS
        elif self.in_windows and busy(self.block, self.windows(True)[0]) >= BUSY:
            leans = V_LEANS
        else:
            leans = V_LEANS[:1]
        return steady(self.block, self.takes, self.transfer, leans)

    def windows(self, leans: bool) -> tuple[int, ...]:
        """How many windows a warm-up may have: none, until the first B, or until all devices are in the steady state.

        The first microbatch has crossed the devices four times, a device a window, when its last B ends; until the
        first devices have caught up with the last, it takes about as long as to cross them once more.
        """
        if not self.in_windows:
            return (0,)
        return (5 * self.block.p - 4,) if leans else (0, len(self.block.placement))

    def grids(self, found: Steady) -> list[Grid]:
        """The grids for a steady state with the shortest intervals, the best first."""
        leans = found.lean > 0 and self.in_windows
        choices = product(FINER[:-1] if leans else FINER, ROUNDINGS, (False, True))
        tried = (refined(found, finer * self.block.interval, *choice) for finer, *choice in choices)
        grids = {grid.block: grid for grid in tried if grid}.values()
        if not self.plain.sharded:
            return self.turned(grids, leans)
        sized = [self.sized(grid, grid.block.pass_slots, max(STATS)) for grid in grids]
        best = [_fastest(self.late(grid, slots) for slots in LATE)[0] for grid in sized if grid]
        best = _fastest(best)
        best += [
            self.late(other, grid.slots)
            for grid in best
            for slots in range(max(1, grid.refined.block.pass_slots - 1), grid.refined.block.pass_slots + 2)
            for stats in STATS
            if (other := self.sized(grid.refined, slots, stats))
        ]
        return self.with_best_ends(best)[: GRIDS + WHOLE]

    def turned(self, grids: Iterable[Refined], leans: bool) -> list[Grid]:
        """The fastest grids, each with intervals that open in the best of the block's slots.

        Where both ends of a transfer wait for each other, no transfer crosses the end of an interval, so that it
        matters which ones it cuts short.
        """
        tried = []
        for grid, turn in product(grids, range(self.block.interval if self.many else 1)):
            finer = grid.block.interval // self.block.interval
            sized = self.sized(grid.turned(turn * finer), grid.block.pass_slots, max(STATS))
            late = (DEFERRED[:1] if leans else DEFERRED) if self.many else (0,)
            tried += [(turn, deferring(sized, slots * finer)) for slots in late]
        if self.in_windows:
            tried = self.near(tried)
        scored = [(turn, self.scored(self.opened(grid, n))) for n in self.windows(leans) for turn, grid in tried]
        return _fastest(_different(scored), self.few if self.many else GRIDS)

    def near(self, tried: list[tuple[int, Grid]]) -> list[tuple[int, Grid]]:
        """The grids with nearly the best steady state."""
        paces = [self.paced(grid.candidate(grid.late)).score for _, grid in tried]
        return [one for one, pace in zip(tried, paces, strict=True) if pace <= min(paces) * (1 + NEARLY)]

    def with_best_ends(self, grids: list[Grid]) -> list[Grid]:
        """The grids, best first, after the best whole iterations among those with nearly the best steady state."""
        ranked = sorted(grids, key=lambda grid: grid.score)
        near: dict = {}
        for grid in ranked:
            if grid.score <= ranked[0].score * (1 + NEAR) and len(near) < COMPARED:
                near.setdefault((grid.refined.block, grid.late), grid)
        whole = sorted(near.values(), key=lambda grid: self.judged(grid.candidate(grid.late)).score)[:WHOLE]
        return [*whole, *(grid for grid in ranked if not any(grid is one for one in whole))]

    def sized(self, grid: Refined, slots: int, stats: int) -> Grid | None:
        """A grid on which a large collective takes so many slots, and the softmax statistics so many."""
        if self.plain.sharded:
            grid = replace(grid, block=replace(grid.block, pass_slots=slots, stats_slots=stats))
        build = self.repeated_block(grid.block)
        try:
            return Grid(grid, order_of(grid, build(1)), build)
        except ValueError:  # fewer intervals are inserted than its passes need
            return None

    def late(self, grid: Grid, slots: int) -> Grid:
        """The grid with the transfers of an interval's last slots deferred, and how long it takes."""
        return self.scored(deferring(grid, slots))

    def scored(self, grid: Grid) -> Grid:
        """The grid with the score of its candidate."""
        return replace(grid, score=self.measured(grid.candidate(grid.late)).score)

    def opened(self, grid: Grid, windows: int) -> Grid:
        """The grid with a warm-up of so many windows."""
        if not windows:
            return grid
        build = partial(self._in_windows, Windows(grid.refined.block, windows))
        return replace(grid, order=replace(grid.order, windows=windows), build=build)

    def _in_windows(self, windows: Windows, m: int) -> Schedule:
        return self.counted(windows.schedule(self.method, m, self.name))


def deferring(grid: Grid, slots: int) -> Grid:
    """The grid with the transfers of an interval's last slots deferred."""
    late = frozenset(maker for maker in grid.makers if maker[0] >= grid.refined.block.interval - slots)
    return replace(grid, slots=slots, late=late)


def _fastest(grids: Iterable[Grid], few: int = GRIDS) -> list[Grid]:
    """The few that take the least time, the first of equals."""
    return sorted(grids, key=lambda grid: grid.score)[:few]


def _different(grids: Iterable[tuple[int, Grid]]) -> Iterable[Grid]:
    """One grid for every turn and time: whole iterations that take equally long are mostly the same program."""
    found: dict[tuple[int, str], Grid] = {}
    for turn, grid in grids:
        found.setdefault((turn, f"{grid.score:.9g}"), grid)
    return found.values()
