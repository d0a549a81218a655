"""What a candidate schedule is worth: the simulated time of its program, by the rules of the machine it is for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf

import numpy as np

from .blocks import Block
from .candidates import Candidate
from .lowering.program import Program, lower
from .repeat import repeat
from .schedule import Schedule
from .simulation.durations import Durations
from .simulation.simulator import Rules, simulate, steady_interval
from .simulation.timeline import Timeline
from .steady import KINDS

Times = Durations | Callable[[Schedule], Durations]

WAITING = 1.0  # what the longest wait counts, beside the whole iteration


class Judge:
    """A block to be repeated ``m`` times with a vocabulary method, and for what its schedules are judged.

    The arguments are those of :func:`.fit.fit`.
    """

    def __init__(self, block: Block, method: str, m: int, durations: Times, name, rules: Rules, inserted, counts):
        self.block, self.method, self.name, self.rules, self.inserted = block, method, name, rules, inserted
        self.counts = counts
        self.durations = durations if callable(durations) else lambda _: durations
        self.plain = self.repeated_block(block)(1)
        self.m, self.trial = m, min(m, 3 * block.p + 8)  # long enough for the steady state
        starts = [x.start for of_device in self.plain.passes for x in of_device]
        self.short = min(m, (max(starts) - min(starts)) // block.interval + 5)  # an interval of two in the steady state
        given = self.durations(self.plain)
        stages = range(self.plain.stages)
        self.takes = {
            kind: np.array([given.of(self.plain, kind, self.plain.chunk(s))[block.placement[s]] for s in stages])
            for kind in KINDS
            if getattr(block, kind)
        }
        self.transfer = float(np.max(given.transfer)) if block.p > 1 else 0.0
        self.gap = float(np.max(given.H))  # from the last stage's F to its B, where ends are filled
        self.in_flight = max(lower(self.repeated_block(block)(self.trial)).in_flight)

    def repeated_block(self, block: Block) -> Callable[[int], Schedule]:
        """What repeats a block for any number of microbatches."""
        return lambda m: self.counted(repeat(block, self.method, m, self.name, self.inserted))

    def counted(self, schedule: Schedule) -> Schedule:
        """The schedule with the layers of its stages."""
        return replace(schedule, layer_counts=self.counts)

    def repeated(self, m: int) -> Schedule:
        """The block as it is."""
        return self.repeated_block(self.block)(m)

    def makespan(self, schedule: Schedule) -> float:
        """Simulated time of the whole iteration."""
        return simulate(lower(schedule), self.durations(schedule), self.rules).makespan

    def judged(self, candidate: Candidate, program: Program | None = None) -> Candidate:
        """The candidate with its simulated time; infinite if it cannot run or holds more than the block.

        Args:
            candidate: to judge.
            program: what :meth:`lowered` made of it, if it is at hand.
        """
        program = program or self.lowered(candidate)
        if program is None:
            return replace(candidate, score=inf)
        timeline = simulate(program, self.durations(program.schedule), self.rules)
        score = self.whole(timeline) + WAITING * float(timeline.idle.max())
        carried = program.rings.get("carried", 0)
        return replace(candidate, score=score, instructions=program.instructions, carried=carried)

    def whole(self, timeline: Timeline) -> float:
        """The time of the whole iteration, of which the timeline may be a shorter one."""
        more = self.m - timeline.schedule.m
        return timeline.makespan + (more * timeline.steady_interval if more > 0 else 0.0)

    def settled(self, candidate: Candidate) -> Candidate:
        """The candidate with the time of its iteration from a trial twice as long, as some programs come to their
        steady state late."""
        if self.m <= 2 * self.trial or candidate.score == inf:
            return candidate
        programs = [lower(candidate.build(m)) for m in (self.trial, 2 * self.trial)]
        short, long = (self.whole(simulate(p, self.durations(p.schedule), self.rules)) for p in programs)
        return replace(candidate, score=candidate.score + long - short)

    def paced(self, candidate: Candidate) -> Candidate:
        """The candidate with the simulated time of its steady state alone."""
        program = self.lowered(candidate, self.short)
        if program is None:
            return replace(candidate, score=inf)
        interval = steady_interval(program, self.durations(program.schedule), self.rules)
        return replace(candidate, score=float(f"{self.m * interval:.9g}"))  # rounded, so that equals are equal

    def lowered(self, candidate: Candidate, m: int | None = None) -> Program | None:
        """The candidate's program for a trial or for ``m`` microbatches; None if it cannot run or holds more than the
        block."""
        try:
            program = lower(candidate.build(self.trial if m is None else m))
        except ValueError:
            return None
        return None if max(program.in_flight) > self.in_flight else program

    def measured(self, candidate: Candidate) -> Candidate:
        """The candidate with what decides between its kind: with a sharded vocabulary, the steady state alone; the
        ends are the same, and it takes a tenth of the time."""
        return self.paced(candidate) if self.plain.sharded else self.judged(candidate)
