"""The best schedule for given durations: candidates from a building block, judged by simulating their programs.

A candidate is the block on a grid of slots that follows the durations (:mod:`.steady`), with warm-up and cool-down
filled (:mod:`.ends`), and a program order: behind which pass a transfer leaves, and whether it leaves at the beginning
of the next interval instead. The block as it is, merely repeated, is one of the candidates. What decides is
:func:`.simulate` with the rules of the machine that the program is for: nothing is assumed to be better than it is
there. The search tries a fixed number of candidates in a fixed order, so that it comes to the same schedule everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf

import numpy as np

from .blocks import Block
from .ends import Filling, Starts, fill
from .lowering.program import lower
from .schedule import Order, Pass, Schedule, Step, Vocabulary
from .simulation.simulator import GPU, Durations, Rules, simulate
from .steady import KINDS, Refined, refined, steady
from .vocabulary import insert, unsharded

Times = Durations | Callable[[Schedule], Durations]

FINER = (1, 2, 3)  # how many times as many slots an interval as the block has
ROUNDINGS = (0.999, 0.5)
GRIDS = 2  # grids whose program orders are searched
FILLINGS = (
    Filling(),
    Filling(backwards=True),
    Filling(carried=1, backwards=True),
    Filling(carried=2, backwards=True),
    Filling(carried=1 << 20),
    Filling(carried=1 << 20, patience=1.0),
)
WAITING = 0.25  # what a unit of the longest wait counts, beside one of the whole iteration
CELL = 0.0005  # by which share one more weight gradient that waits on a device must shorten the iteration


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
) -> Schedule:
    """The schedule of a block that takes the least time, with no more microbatches in flight than the block has.

    Args:
        block, method, m, inserted: as for :func:`.build.repeat`.
        durations: of all passes and transfers, or what makes them for a schedule, as :meth:`.cost.Cost.durations`.
        rules: of the machine.

    Raises:
        ValueError: as :func:`.build.repeat` does.
    """
    search = _Search(block, method, m, durations, name, rules, inserted)
    return search.best().build(m)


class _Search:
    def __init__(self, block: Block, method: str, m: int, durations: Times, name: str, rules: Rules, inserted):
        self.block, self.method, self.name, self.rules, self.inserted = block, method, name, rules, inserted
        self.plain = self._repeated(block)(1)
        self.durations = durations if callable(durations) else lambda _: durations
        self.trial = min(m, 3 * block.p + 8)  # long enough for the steady state
        given = self.durations(self.plain)
        stages = range(self.plain.stages)
        self.takes = {
            kind: np.array([given.of(self.plain, kind, self.plain.chunk(s))[block.placement[s]] for s in stages])
            for kind in KINDS
            if getattr(block, kind)
        }
        self.transfer = float(np.max(given.transfer)) if block.p > 1 else 0.0
        self.gap = _gap(self.plain, given)
        self.in_flight = max(lower(self._repeated(block)(self.trial)).in_flight)

    def _repeated(self, block: Block) -> Callable[[int], Schedule]:
        return lambda m: _schedule(block, self.method, m, self.name, self.inserted, None)

    def best(self) -> _Candidate:
        """The best of all candidates."""
        plain = _Candidate(self._repeated(self.block))
        found = [self.judged(plain), self.judged(plain.with_order(Order(transfers="behind passes")))]
        grids = sorted(self.grids(), key=lambda grid: grid[0].score)[:GRIDS]
        found += [self.filled(*grid) for grid in grids]
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
        extra = CELL * max(program.peaks.get("carried", (0,)))
        score = (timeline.makespan + WAITING * float(timeline.idle.max())) * (1 + extra)
        return replace(candidate, score=score)

    def grids(self) -> Iterator[tuple[_Candidate, Refined, Order]]:
        """The repeated block on finer and finer grids."""
        if not self.block.B or self.block.group > 1 or self.block.interval < 2:
            return
        found = steady(self.block, self.takes, self.transfer)
        for finer in FINER:
            for rounding in ROUNDINGS:
                grid = refined(found, finer * self.block.interval, rounding)
                for slots in self._pass_slots(grid):
                    sized = replace(grid, block=replace(grid.block, pass_slots=slots))
                    candidate = _Candidate(self._repeated(sized.block))
                    try:
                        order = _order(sized, candidate.build(1))
                    except ValueError:  # fewer intervals are inserted than its passes need
                        continue
                    yield self.judged(candidate.with_order(order)), sized, order

    def _pass_slots(self, grid: Refined | None) -> Sequence[int]:
        """How many slots a large collective may take: those of the longest pass, or fewer or more."""
        if grid is None:
            return ()
        slots = grid.block.pass_slots
        return sorted({1, slots, slots + 1}) if self.plain.sharded else (1,)

    def filled(self, start: _Candidate, grid: Refined, order: Order) -> _Candidate:
        """A grid with the best filling of its ends and the best program order."""
        best = start
        if self.block.W:
            for filling in FILLINGS:
                ends = _Ends(grid.block, self.takes, self.transfer, self.gap, filling)
                candidate = _Candidate(self._with_ends(grid.block, ends)).with_order(order)
                best = min(best, self.judged(candidate), key=lambda found: found.score)
        return self.ordered(best, grid, order)

    def _with_ends(self, block: Block, ends: _Ends) -> Callable[[int], Schedule]:
        return lambda m: _schedule(block, self.method, m, self.name, self.inserted, ends)

    def ordered(self, start: _Candidate, grid: Refined, order: Order) -> _Candidate:
        """The candidate with some transfers deferred: those of an interval's last slots, then one more or one less."""
        slots = sorted(order.passes)
        makers = [(slot, *kind) for slot in slots for kind in order.passes[slot] if kind[0] != "W"]
        best, deferred = start, frozenset()

        def tried(these: frozenset) -> bool:
            nonlocal best, deferred
            candidate = self.judged(start.with_order(replace(order, deferred=these)))
            if candidate.score < best.score * (1 - 1e-9):
                best, deferred = candidate, these
                return True
            return False

        for first in slots[len(slots) // 2 :]:
            tried(frozenset(maker for maker in makers if maker[0] >= first))
        for maker in sorted(makers, reverse=True):
            tried(deferred ^ {maker})
        return best


def _order(grid: Refined, schedule: Schedule) -> Order:
    """The program order that follows the times at which passes end."""
    opens = next((s.at[0] for s in schedule.vocabulary.steps if (s.op, s.name) == ("start", "C0")), 0)
    K = grid.block.interval
    opens = opens if schedule.sharded else 0
    return Order({(slot - opens) % K: kinds for slot, kinds in grid.passes.items()}, "behind passes")


def _gap(schedule: Schedule, durations: Durations) -> float:
    """Time from the last stage's F to when its B can start, at least."""
    between = ("C0", "S", "stats", "T", "big") if schedule.sharded else ("H",)
    return float(sum(np.max(getattr(durations, name)) for name in between))


# --- from a block to a schedule --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ends:
    """How to fill the ends of a block's repetition."""

    block: Block
    takes: Mapping[str, np.ndarray]
    transfer: float
    gap: float
    filling: Filling

    def __call__(self, block: Block, starts: Starts) -> Starts:
        """The slots of every pass; a long iteration has the ends of a short one."""
        m, probe = starts["F"].shape[1], 4 * block.p + 8
        if m <= probe:
            return fill(block, starts, self.takes, self.transfer, self.gap, self.filling)
        short = {kind: slots[:, :probe] for kind, slots in starts.items()}
        moved = fill(block, short, self.takes, self.transfer, self.gap, self.filling)
        half, found = probe // 2, {}
        for kind, slots in starts.items():
            found[kind] = slots.copy()
            found[kind][:, :half] += (moved[kind] - short[kind])[:, :half]
            found[kind][:, m - probe + half :] += (moved[kind] - short[kind])[:, half:]
        return found


def _schedule(block: Block, method: str, m: int, name: str, inserted: int | None, ends: _Ends | None) -> Schedule:
    """The repeated block with a method's vocabulary passes and, where given, its ends filled."""
    block, vocabulary = insert(block, method, m, inserted)
    if inserted is not None and vocabulary.inserted_intervals != inserted:
        raise ValueError(
            f"inserted is {inserted}; {method} on this block takes {vocabulary.inserted_intervals} intervals or more"
        )
    shifts = np.array([block.shift(i) for i in range(m)])
    repeated = {kind: np.array(getattr(block, kind))[:, None] + shifts for kind in KINDS if getattr(block, kind)}
    starts = repeated if ends is None else ends(block, repeated)
    if ends is not None:
        vocabulary = _moved_steps(block, vocabulary, repeated, starts)
    passes = [
        sorted(
            (
                Pass(kind, stage, i, slot, block.backward_slots if kind == "B" else 1)
                for kind, slots in starts.items()
                for stage, on in enumerate(block.placement)
                if on == d
                for i, slot in enumerate(slots[stage].tolist())
            ),
            key=lambda x: x.start,
        )
        for d in range(block.p)
    ]
    return Schedule(name, block.p, m, block.interval, block.placement, tuple(map(tuple, passes)), vocabulary)


def _moved_steps(block: Block, vocabulary: Vocabulary, before: Starts, after: Starts) -> Vocabulary:
    """The input layer's steps where the first stage's passes have moved to."""
    if not any(s.name == "C0" for s in vocabulary.steps):
        steps = unsharded(block.placement, after["F"][0], after["F"][-1], after["B"][0])
        return replace(vocabulary, steps=steps)
    moved = (after["F"] - before["F"])[0].tolist()

    def shifted(step: Step) -> Step:
        if step.name not in ("IF", "CI"):
            return step
        shifts = [shift + by for shift, by in zip(vocabulary.shifts, moved, strict=True)]
        at = tuple(None if t is None else t + shifts[0] for t in step.at)
        return replace(step, at=at, shifts=tuple(shift - shifts[0] for shift in shifts))

    return replace(vocabulary, steps=tuple(map(shifted, vocabulary.steps)))
