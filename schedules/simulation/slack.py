"""How late passes may end without delaying the last one.

The simulation in reverse: from the end of the last pass back through the program, every instruction hands its limit on
to those that must come before it, on its own device and, through transfers and collectives, on others.
"""

from __future__ import annotations

import numpy as np

from ..lowering.program import Instruction, Segment
from .durations import Durations
from .simulator import Rules
from .timeline import Timeline, Track


def latest_ends(timeline: Timeline, durations: Durations, rules: Rules, since: int) -> dict[int, np.ndarray]:
    """When the instructions of every scan, by its first interval, must end at the latest, ``[intervals, lines, p]``.

    Infinite for all but passes, before interval ``since``, and on devices for which nothing waits any more.

    Args:
        timeline, durations, rules: what was simulated, by rules in which both ends of a transfer wait.
        since: the first interval that is looked at.
    """
    reverse = _Reverse(timeline, durations, rules)
    found = {}
    for segment in reversed(timeline.program.segments):
        found[segment.first_interval] = reverse.run(segment, since)
    return found


class _Reverse:
    """The latest time of every device's clock and streams, carried backwards through the program."""

    def __init__(self, timeline: Timeline, durations: Durations, rules: Rules):
        self.durations, self.rules, self.p = durations, rules, timeline.schedule.p
        self.tracks = {(track.first_interval, track.line): track for track in timeline.tracks}
        self.last = max(float(t.end[t.microbatch >= 0].max(initial=0.0)) for t in timeline.tracks if t.op == "run")
        self.transfer = np.broadcast_to(np.asarray(durations.transfer, float), (self.p, self.p))
        self.clock, self.launched, *streams = np.full((4, self.p), np.inf)
        self.transfer_stream, self.collective_stream = streams
        self.collectives = np.inf
        self.until: dict[int, np.ndarray] = {}
        self.pending: dict[str, float] = {}

    def run(self, segment: Segment, since: int) -> np.ndarray:
        """One scan, from its end."""
        found = np.full((segment.intervals, len(segment.body), self.p), np.inf)
        steps = {"permute": self._permute, "land": self._land, "start": self._start, "done": self._done}
        for n in range(segment.intervals - 1, max(0, since - segment.first_interval) - 1, -1):
            for line in range(len(segment.body) - 1, -1, -1):
                instruction = segment.body[line]
                if instruction.op == "run":
                    found[n, line] = self._run(self.tracks[segment.first_interval, line], n)
                elif instruction.op in steps:
                    steps[instruction.op](instruction)
        return found

    def _run(self, track: Track, n: int) -> np.ndarray:
        ends = self.clock
        takes = np.where(track.microbatch[n] >= 0, track.end[n] - track.start[n], 0.0)
        limit = np.where(track.microbatch[n] >= 0, np.minimum(ends, self.last), ends)
        self.clock = limit - takes - self.durations.overhead
        return ends

    def _land(self, instruction: Instruction) -> None:
        if self.rules.transfers == "asynchronous":
            self.until[instruction.transfer] = self.clock

    def _permute(self, instruction: Instruction) -> None:
        source, target = np.array(instruction.pairs, int).T
        until = self.until.pop(instruction.transfer) if self.rules.transfers == "asynchronous" else self.clock
        if self.rules.streams:
            until = np.minimum(until, self.transfer_stream)
        ready = np.minimum(until[source], until[target]) - self.transfer[source, target]
        free = np.full(self.p, np.inf)
        np.minimum.at(free, source, ready)
        np.minimum.at(free, target, ready)
        involved = np.union1d(source, target)
        if self.rules.streams:
            free[involved] = np.minimum(free[involved], self.launched[involved])
            self.launched[involved] = free[involved]
            self.transfer_stream = np.minimum(self.transfer_stream, free)
        self.clock = np.minimum(self.clock, free)

    def _done(self, instruction: Instruction) -> None:
        self.pending[instruction.name] = float(self.clock.min())

    def _start(self, instruction: Instruction) -> None:
        end = min(self.pending.pop(instruction.name, np.inf), self.collectives)
        if self.rules.streams:
            end = min(end, float(self.collective_stream.min()))
        if self.rules.collectives == "blocking":
            end = min(end, float(self.clock.min()))
        begin = end - (getattr(self.durations, instruction.name) if self.p > 1 else 0.0)
        free = np.full(self.p, begin)
        self.collectives = begin
        if self.rules.streams:
            free = np.minimum(free, self.launched)
            self.launched, self.collective_stream = free, np.minimum(self.collective_stream, free)
        self.clock = np.minimum(self.clock, free)
