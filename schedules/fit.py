"""The best schedule for given durations: candidates from a building block, judged by simulating their programs.

A candidate is the block on a grid of slots that follows the durations (:mod:`.steady`) with a program order: the order
of passes within a slot, and whether a transfer is issued after its pass, before a later one or at the start of the next
interval. Its warm-up and cool-down may be filled (:mod:`.ends`, :mod:`.late_weights`, :mod:`.reorder`) or be scans of
their own. The block merely repeated, with a full or a short broadcast, is one of the candidates. The simulated time of
their programs decides (:mod:`.judge`). The search tries a fixed list of candidates in a fixed order, so it finds the
same schedule everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from math import inf

from .blocks import Block
from .candidates import Candidate, Grid, order_of
from .ends import Ends
from .judge import Judge, Times
from .late_weights import Cooling, Late
from .queues import Filling
from .reorder import can_reorder, reorder
from .schedule import Order, Schedule
from .simulation.simulator import GPU, Rules
from .steady import Refined, Steady, refined, steady

FINER = (1, 2, 3)  # how many times as many slots an interval as the block has
ROUNDINGS = (0.999, 0.5)
NEAR, COMPARED = 0.005, 10  # grids whose steady states differ by less, at most so many, are compared as a whole
WHOLE = 2  # of those, so many are searched further
GRIDS = 2  # grids whose program orders are searched
FEW = 16  # devices up to which more is tried: two grids if the vocabulary is not sharded, instead of one
LEANS = (0.0, 0.1, 0.2)  # shares of the time to spare for transfers that are moved from backwards to forwards
STATS = (2, 3)  # slots for the softmax statistics
LATE = (1, 2)  # of how many of an interval's last slots the transfers are deferred, with a sharded vocabulary
EARLY = (
    Filling(),
    Filling(backwards=True),
    Filling(carried=1, backwards=True),
    Filling(carried=2, backwards=True),
    Filling(carried=1 << 20),
    Filling(carried=1 << 20, patience=1.0),
)
"""Fillings for devices that do not wait for each other's transfers."""
DELAYED = 8  # candidates whose last weight gradients are delayed; with more than FEW devices, 4, or 2 of a V
DELAYS = (0.0, 0.5)  # by what share of its time a weight gradient of the cool-down may delay another pass
TOGGLED = (8, 5)  # transfers that are deferred or not one by one, and with more than FEW devices
MORE_CARRIED = {1: 0.002, 1 << 20: 0.006}  # what so many more that wait must save at least, as they take memory
MORE_CODE = {1: 0.002, 2: 0.01}  # what scans for warm-up and cool-down must save at least, by Order.ends_apart
MERGED = (2, 4, 8, 16, 1 << 20)  # how many instructions apart merged transfers may land
MERGING = 0.002  # what that may add to the score, in which a delay also counts as a wait
EQUAL = 0.001  # of candidates that differ by less, the one with the fewest instructions is taken
TWICE = 0.005  # what two microbatches per interval must save at least: the code doubles


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
    """The fastest schedule of a block, with no more microbatches in flight than the block has.

    A block without W passes keeps its passes in their slots, as its transfers have no time to spare; only its broadcast
    may become shorter.

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
    search = _Search(block, method, m, durations, name, rules, inserted, counts)
    return min((search.best().build(m), search.repeated(m)), key=search.makespan)


class _Search(Judge):
    def best(self) -> Candidate:
        """The best of all candidates."""
        found = [*map(self.judged, self.repetitions()), *self.on_grids()]
        if self.plain.sharded and can_reorder(self.block):
            found.append(self.judged(Candidate(self._reordered)))
        found.sort(key=lambda candidate: candidate.score)
        few = DELAYED if self.block.p <= FEW else 4 // self.plain.chunks
        for start in found[:few]:
            found += self.later(start)
        best = _worth_its_memory(found)
        equal = [c for c in found if c.score <= best.score * (1 + EQUAL) and c.carried <= best.carried]
        best = min(equal, key=lambda candidate: (candidate.instructions, candidate.score))
        others = [c for c in found if c is not best and c.carried <= best.carried]
        tried = [best, *sorted(others, key=lambda candidate: candidate.score)[:1]]
        for far, least in MORE_CODE.items():
            apart = [self.judged(candidate.apart(far)) for candidate in tried if candidate.score < inf]
            best = best.or_better(min(apart, key=lambda candidate: candidate.score, default=best), least)
        return self.merged(best.or_better(self.unrolled(best), TWICE))

    def merged(self, candidate: Candidate) -> Candidate:
        """The candidate with as many of its transfers merged as it can do with; behind slots they are already."""
        if candidate.build(self.trial).order.transfers == "behind slots":
            return candidate
        choices = product(("before passes", "behind passes"), MERGED)
        tried = [candidate.merged(*choice) for choice in choices]
        programs = [(program.instructions, n, program) for n, c in enumerate(tried) if (program := self.lowered(c))]
        for instructions, n, program in sorted(programs, key=lambda row: row[:2]):
            if instructions >= candidate.instructions:
                break
            merged = self.judged(tried[n], program)
            if merged.score <= candidate.score * (1 + MERGING):
                return merged
        return candidate

    def unrolled(self, candidate: Candidate) -> Candidate:
        """The candidate with two microbatches per interval and the best transfers deferred."""
        late = range(self.block.interval // 3 + 1)
        tried = [self.measured(candidate.unrolled(slots)) for slots in (None, *late)]
        best = min(tried, key=lambda candidate: candidate.score)
        return self.judged(best) if self.plain.sharded else best

    def repetitions(self) -> list[Candidate]:
        """The block repeated, with a full or a short broadcast, and transfers behind slots or passes."""
        blocks = [self.block]
        if self.plain.sharded and self.block.longest > 1 and self.method != "interlaced":
            # A pass then hides the sum of gradients, which may take longer, instead of the broadcast.
            blocks.append(replace(self.block, broadcast_slots=1))
        plain = [Candidate(self.repeated_block(block)) for block in blocks]
        return plain + [candidate.with_order(Order(transfers="behind passes")) for candidate in plain]

    def on_grids(self) -> Iterator[Candidate]:
        """The block on the best grids, with the best transfers deferred; if nothing waits, with its ends filled."""
        several = self.plain.sharded or self.block.p <= FEW
        for n, state in enumerate(self.states()):
            for grid in self.grids(state)[: None if several and n == 0 else 1]:
                best = self.deferred(grid)
                if self.plain.sharded:
                    yield self.judged(best)
                else:
                    yield self.filled(best, grid) if self.rules.transfers == "eager" else best

    def states(self) -> list[Steady]:
        """The steady states on whose grids the block is put."""
        if not self.block.W or self.block.group > 1 or self.block.interval < 2:
            return []
        # In a V, forwards go both ways: time can rarely be moved from backwards to forwards, and that has not paid.
        leans = LEANS if len(self.block.placement) == self.block.p else LEANS[:1]
        return steady(self.block, self.takes, self.transfer, leans)

    # --- grids -------------------------------------------------------------------------------------------------------

    def grids(self, found: Steady) -> list[Grid]:
        """The grids for a steady state with the shortest intervals, the best first."""
        choices = product(FINER, ROUNDINGS, (False, True))
        grids = [refined(found, finer * self.block.interval, *choice) for finer, *choice in choices]
        sized = [self.sized(grid, grid.block.pass_slots, max(STATS)) for grid in grids if grid]
        late = LATE if self.plain.sharded else (0,)
        best = [_fastest(self.late(grid, slots) for slots in late)[0] for grid in sized if grid]
        if self.plain.sharded:
            best = _fastest(best)
            best += [
                self.late(other, grid.slots)
                for grid in best
                for slots in range(max(1, grid.refined.block.pass_slots - 1), grid.refined.block.pass_slots + 2)
                for stats in STATS
                if (other := self.sized(grid.refined, slots, stats))
            ]
            return self.with_best_ends(best)[: GRIDS + WHOLE]
        best = _fastest(_different(best))
        if self.rules.transfers != "eager" and self.block.p <= FEW:
            turned = [self.turned(grid, turn) for grid in best for turn in range(1, self.block.interval)]
            best += _fastest(_different(turned))
        return best

    def turned(self, grid: Grid, turn: int) -> Grid:
        """A grid whose intervals open so many of the block's slots earlier."""
        slots = turn * grid.refined.block.interval // self.block.interval
        return self.late(self.sized(grid.refined.turned(slots), grid.refined.block.pass_slots, max(STATS)), grid.slots)

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
        late = frozenset(maker for maker in grid.makers if maker[0] >= grid.refined.block.interval - slots)
        return replace(grid, slots=slots, late=late, score=self.measured(grid.candidate(late)).score)

    def filled(self, start: Candidate, grid: Grid) -> Candidate:
        """A candidate on a grid with the best filling of its ends; the vocabulary is not sharded."""
        best = start
        for filling in EARLY:
            ends = Ends(grid.refined.block, filling, self.takes, self.transfer, self.gap)
            candidate = Candidate(partial(self._with_ends, ends)).with_order(start.build(1).order)
            best = best.or_better(self.judged(candidate))
        return best

    def later(self, start: Candidate) -> Iterator[Candidate]:
        """A candidate with the weight gradients of its cool-down where devices wait anyway, with more or fewer of them
        waiting."""
        program = self.lowered(start)
        if program is None or not self.block.W or self.rules.transfers == "eager":
            return
        given, seen = self.durations(program.schedule), []
        delays = DELAYS if self.block.p <= FEW else DELAYS[:1]
        coolings = [Cooling(program, given, self.rules, chunk) for chunk in range(program.schedule.chunks)]
        for more, cooling, delay in product((0, *MORE_CARRIED), coolings, delays):
            shifts = cooling.shifts(Late(program.rings["carried"] + more, delay))
            if shifts not in seen:
                seen.append(shifts)
                yield self.judged(start.later(shifts))

    def _with_ends(self, ends: Ends, m: int) -> Schedule:
        return self.counted(ends.schedule(self.method, m, self.name))

    def _reordered(self, m: int) -> Schedule:
        found = reorder(self.block, self.method, m, self.name, self.inserted)
        if found is None:
            raise ValueError("no order of passes takes fewer slots than the repeated block")
        return self.counted(found)

    def deferred(self, grid: Grid) -> Candidate:
        """A grid with the best transfers deferred: those of an interval's last slots, then one more or one fewer."""
        best, chosen = replace(grid.candidate(grid.late), score=grid.score), grid.late

        def tried(these: frozenset) -> None:
            nonlocal best, chosen
            candidate = self.measured(grid.candidate(these))
            if candidate.score < best.score * (1 - 1e-9):
                best, chosen = candidate, these

        if not self.plain.sharded:
            slots = [slot for slot, _ in grid.order.passes]
            for first in slots[len(slots) // 2 :: 1 + len(slots) // 16]:
                tried(frozenset(maker for maker in grid.makers if maker[0] >= first))
        for maker in sorted(grid.makers, reverse=True)[: TOGGLED[self.block.p > FEW]]:
            tried(chosen ^ {maker})
        return best


def _worth_its_memory(found: Iterable[Candidate]) -> Candidate:
    """The fastest candidate whose waiting weight gradients save enough, beside those with fewer, for their memory."""
    best, *others = sorted(found, key=lambda candidate: (candidate.score == inf, candidate.carried, candidate.score))
    for other in others:
        more = other.carried - best.carried
        best = best.or_better(other, next(least for n, least in ({0: 0.0} | MORE_CARRIED).items() if more <= n))
    return best


def _fastest(grids: Iterable[Grid]) -> list[Grid]:
    """The few that take the least time, the first of equals."""
    return sorted(grids, key=lambda grid: grid.score)[:GRIDS]


def _different(grids: Iterable[Grid]) -> Iterable[Grid]:
    """One grid for every time: whole iterations that take equally long are mostly the same program."""
    by_time: dict[str, Grid] = {}
    for grid in grids:
        by_time.setdefault(f"{grid.score:.9g}", grid)
    return by_time.values()
