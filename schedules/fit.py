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
from .candidates import Candidate, Grid, Maker, Waiting
from .ends import Ends
from .grids import FEW, V_LEANS, Grids
from .judge import Times
from .late_weights import Cooling, Late
from .queues import Filling
from .reorder import can_reorder, reorder
from .schedule import Order, Schedule
from .simulation.simulator import GPU, Rules

EARLY = (
    Filling(),
    Filling(backwards=True),
    Filling(carried=1, backwards=True),
    Filling(carried=2, backwards=True),
    Filling(carried=1 << 20),
    Filling(carried=1 << 20, patience=1.0),
)
"""Fillings for devices that do not wait for each other's transfers."""
DELAYS = (0.0, 0.5)  # by what share of its time a weight gradient of the cool-down may delay another pass
TOGGLED = (8, 5)  # transfers that are deferred or not one by one, and with more than FEW devices
CARRIED = (0, 1, 1 << 20)  # how many more weight gradients may wait than in the repeated block
CARRYING = 0.0015  # what each weight gradient that waits must save at least, as it takes memory
MORE_CODE = {1: 0.002, 2: 0.01}  # what scans for warm-up and cool-down must save at least, by Order.ends_apart
MERGED = (2, 4, 8, 16, 1 << 20)  # how many instructions apart merged transfers may land
MERGING = 0.001  # what that may add to the score, in which a delay also counts as a wait
EQUAL = 0.001  # of candidates that differ by less, the one with the fewest instructions is taken
TWICE = 0.005  # what doubling the instructions must save at least, as two microbatches per interval do


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


class _Search(Grids):
    def best(self) -> Candidate:
        """The best of all candidates."""
        found = [*map(self.judged, self.repetitions()), *self.on_grids()]
        if self.plain.sharded and can_reorder(self.block):
            found.append(self.judged(Candidate(self._reordered)))
        found.sort(key=lambda candidate: candidate.score)
        for start, ways in self.promising(found):
            found += self.later(start, ways)
        found.append(self.toggled(min(found, key=_worth_its_memory)))
        best = self.best_settled(found)
        equal = [c for c in found if c.score <= best.score * (1 + EQUAL) and c.carried <= best.carried]
        best = min(equal, key=lambda candidate: (candidate.instructions, candidate.score))
        others = [c for c in found if c is not best and c.carried <= best.carried]
        tried = [best, *sorted(others, key=lambda candidate: candidate.score)[:1]]
        for far, least in MORE_CODE.items():
            apart = [self.judged(candidate.apart(far)) for candidate in tried if candidate.score < inf]
            other = min(apart, key=lambda candidate: candidate.score, default=best)
            growth = other.instructions / max(1, best.instructions) - 1
            best = self.better(best, other, max(least, TWICE * growth))
        return self.merged(self.better(best, self.unrolled(best), TWICE))

    def promising(self, found: list[Candidate]) -> list[tuple[Candidate, list[Waiting]]]:
        """The few best on the grids of every steady state, and how their weight gradients may wait: where transfers
        towards the last device have more time, as long as they can, or the first devices wait."""
        chunks, starts = range(self.plain.chunks), []
        some = [Waiting(*way) for way in product(CARRIED, chunks, DELAYS if self.block.p <= FEW else DELAYS[:1])]
        all_of_them = [Waiting(CARRIED[-1], chunk, 0.0) for chunk in chunks]
        for lean in V_LEANS if self.in_windows else V_LEANS[:1]:
            of_state = [c for c in found if not self.in_windows or (c.grid.refined.lean if c.grid else 0.0) == lean]
            starts += [(c, all_of_them if lean else some) for c in of_state[: self.few // 2 if lean else self.few]]
        return starts

    def best_settled(self, found: list[Candidate]) -> Candidate:
        """The best candidate if its steady state has settled; the others' may not have."""
        settled: list[Candidate] = []
        while True:
            n = min(range(len(found)), key=lambda n: _worth_its_memory(found[n]))
            if any(found[n] is candidate for candidate in settled):
                return found[n]
            found[n] = self.settled(found[n])
            settled.append(found[n])

    def better(self, best: Candidate, other: Candidate, least: float) -> Candidate:
        """The other candidate if it is better by more than this share, once its steady state has settled."""
        return best if best.or_better(other, least) is best else best.or_better(self.settled(other), least)

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
            if (found := self.better(candidate, merged, -MERGING)) is not candidate:
                return found
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
            grids = self.grids(state)
            for grid in grids[: None if several and n == 0 or self.in_windows else 1]:
                if self.plain.sharded:
                    yield self.judged(self.deferred(grid))
                elif self.rules.transfers == "eager":
                    yield self.filled(self.deferred(grid), grid)
                else:
                    yield self.judged(grid.candidate(grid.late))

    def filled(self, start: Candidate, grid: Grid) -> Candidate:
        """A candidate on a grid with the best filling of its ends; the vocabulary is not sharded."""
        best = start
        for filling in EARLY:
            ends = Ends(grid.refined.block, filling, self.takes, self.transfer, self.gap)
            candidate = Candidate(partial(self._with_ends, ends)).with_order(start.build(1).order)
            best = best.or_better(self.judged(candidate))
        return best

    def toggled(self, best: Candidate) -> Candidate:
        """A candidate on a grid with the best transfers deferred, judged with its late weight gradients; where windows
        are tried that has not paid, and with a sharded vocabulary it would take too long."""
        if best.grid is None or self.plain.sharded or self.in_windows or self.rules.transfers == "eager":
            return best
        for maker in self.last_makers(best.grid):
            other = self.judged(best.grid.candidate(best.deferred ^ {maker}))
            others = [other] if best.late is None else list(self.later(other, [best.late]))
            best = min([best, *others], key=_worth_its_memory)
        return best

    def later(self, start: Candidate, ways: Iterable[Waiting]) -> Iterator[Candidate]:
        """A candidate with the weight gradients of its cool-down where devices wait anyway, waiting in these ways."""
        program = self.lowered(start)
        if program is None or not self.block.W or self.rules.transfers == "eager":
            return
        given, seen = self.durations(program.schedule), []
        coolings = {chunk: Cooling(program, given, self.rules, chunk) for chunk in {way.chunk for way in ways}}
        for way in ways:
            shifts = coolings[way.chunk].shifts(Late(program.rings["carried"] + way.more, way.delay))
            if shifts not in seen:
                seen.append(shifts)
                yield self.judged(start.later(shifts, way))

    def _with_ends(self, ends: Ends, m: int) -> Schedule:
        return self.counted(ends.schedule(self.method, m, self.name))

    def _reordered(self, m: int) -> Schedule:
        found = reorder(self.block, self.method, m, self.name, self.inserted)
        if found is None:
            raise ValueError("no order of passes takes fewer slots than the repeated block")
        return self.counted(found)

    def deferred(self, grid: Grid) -> Candidate:
        """A grid with the best transfers deferred: those of an interval's last slots, but for one or another."""
        best = self.measured(grid.candidate(grid.late))
        for maker in self.last_makers(grid):
            candidate = self.measured(grid.candidate(best.deferred ^ {maker}))
            if candidate.score < best.score * (1 - 1e-9):
                best = candidate
        return best

    def last_makers(self, grid: Grid) -> list[Maker]:
        """The last of an interval's passes whose transfers can be deferred."""
        return sorted(grid.makers, reverse=True)[: TOGGLED[self.block.p > FEW]]


def _worth_its_memory(candidate: Candidate) -> float:
    """A candidate's score, with what its waiting weight gradients must save for their memory."""
    return candidate.score * (1 + CARRYING * candidate.carried)
