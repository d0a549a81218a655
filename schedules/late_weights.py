"""Weight gradients of the cool-down where their devices would only wait.

No pass waits for a weight gradient. Once a device has no forward left, or none of its first chunk, its weight gradients
may therefore run whenever it waits for something else. The program says where that is: it is simulated without them,
and :mod:`.simulation.slack` finds how late every device may come to each instruction. In a second simulation a device
runs a weight gradient at the first instruction for one at which that delays nothing, or little. What is left runs at
the end.

All other passes keep their slots, and every weight gradient takes a slot for which there is an instruction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import count

import numpy as np

from .lowering.events import opening_slot
from .lowering.program import Instruction, Program, Segment
from .schedule import Pass, Schedule
from .simulation.durations import Durations
from .simulation.simulator import Engine, Rules
from .simulation.slack import latest_ends
from .simulation.timeline import Timeline, Track

Shifts = Mapping[tuple[int, int], int]
"""How many slots later a weight gradient runs, by its stage and how many microbatches from the end."""


@dataclass(frozen=True)
class Late:
    """How long weight gradients may wait.

    Attributes:
        carried: once so many do on a device, it runs one at the next instruction for it.
        delay: by what share of its own time one may delay another pass.
    """

    carried: int
    delay: float = 0.0


def with_shifts(schedule: Schedule, shifts: Shifts) -> Schedule:
    """The schedule, with as many microbatches or more, with its weight gradients so much later."""

    def moved(x: Pass) -> Pass:
        later = shifts.get((x.stage, schedule.m - x.microbatch), 0) if x.kind == "W" else 0
        return x._replace(start=x.start + later)

    passes = (sorted(map(moved, of_device), key=lambda x: x.start) for of_device in schedule.passes)
    return replace(schedule, passes=tuple(map(tuple, passes)))


class Cooling:
    """The cool-down of a program, and when its passes must end at the latest if its weight gradients need not run.

    Attributes:
        schedule: of the program, with W passes.
        starts: slots of all passes, by kind, stage and microbatch.
        movable: the weight gradients that are left out, each a stage and a microbatch: on every device those that
            follow its last forward.
        without: the program without them.
        latest: as :func:`.slack.latest_ends` returns it, for the program without them.
        busy: slots in which each device runs something else.
    """

    def __init__(self, program: Program, durations: Durations, rules: Rules, last_chunk: int):
        """Simulates a program without the weight gradients of its cool-down.

        Args:
            program, durations, rules: as for :func:`.simulator.simulate`; both ends of a transfer must wait for each
                other.
            last_chunk: the last chunk whose forwards count. In a V, those of a device's first chunk end long before
                those of its second.
        """
        self.durations, self.rules = durations, rules
        self.schedule = schedule = program.schedule
        self.starts = {x[:3]: x.start for of_device in schedule.passes for x in of_device}
        self.opens = opening_slot(schedule)
        self.lines = max(len(segment.body) for segment in program.segments)
        last_forward = self._last_forward(program, last_chunk)
        self.movable: set[tuple[int, int]] = set()
        segments = (self._without(segment, last_forward) for segment in program.segments)
        self.without = replace(program, segments=tuple(segments))
        self.busy = [
            {x.start for x in of_device if x.kind != "W" or x[1:3] not in self.movable} for of_device in schedule.passes
        ]
        engine = Engine(self.without, durations, rules)
        for segment in self.without.segments:
            engine.run(segment)
        timeline = Timeline(self.without, tuple(engine.tracks), engine.clock)
        self.latest = latest_ends(timeline, durations, rules, int(last_forward.min()) // self.lines)

    def shifts(self, late: Late) -> Shifts:
        """The weight gradients that run in other slots, and how much later."""
        second = _Second(self, late)
        for segment in self.without.segments:
            second.run(segment)
        second.run_what_is_left()
        m = self.schedule.m
        return {(stage, m - i): slot - self.starts["W", stage, i] for (stage, i), slot in second.taken.items()}

    def place(self, interval, line: int):
        """A number that grows along the program."""
        return interval * self.lines + line

    def slot(self, interval: int, instruction: Instruction) -> int:
        """The schedule's slot in which an instruction runs."""
        return self.opens + interval * self.schedule.interval + instruction.slot

    def _last_forward(self, program: Program, last_chunk: int) -> np.ndarray:
        """The place of every device's last forward."""
        found = np.full(program.schedule.p, -1)
        for segment in program.segments:
            for line, instruction in enumerate(segment.body):
                if (instruction.op, instruction.name) == ("run", "F") and instruction.chunk <= last_chunk:
                    n, d = np.nonzero(instruction.tables["microbatch"] >= 0)
                    np.maximum.at(found, d, self.place(segment.first_interval + n, line))
        return found

    def _without(self, segment: Segment, last_forward: np.ndarray) -> Segment:
        body = list(segment.body)
        intervals = segment.first_interval + np.arange(segment.intervals)[:, None]
        for line, instruction in enumerate(body):
            if (instruction.op, instruction.name) != ("run", "W"):
                continue
            table = instruction.tables["microbatch"].copy()
            late = (table >= 0) & (self.place(intervals, line) > last_forward)
            for n, d in np.argwhere(late).tolist():
                self.movable.add((int(self.schedule.stage_of[instruction.chunk, d]), int(table[n, d])))
            table[late] = -1
            body[line] = replace(instruction, tables=instruction.tables | {"microbatch": table})
        return replace(segment, body=tuple(body))


class _Second(Engine):
    """The simulation in which devices run waiting weight gradients.

    Attributes:
        taken: the slot of every weight gradient that has run, by stage and microbatch.
    """

    def __init__(self, cooling: Cooling, late: Late):
        super().__init__(cooling.without, cooling.durations, cooling.rules)
        self.cooling, self.late = cooling, late
        self.busy = [set(slots) for slots in cooling.busy]
        self.waiting: list[list[tuple[int, int]]] = [[] for _ in range(self.schedule.p)]
        self.taken: dict[tuple[int, int], int] = {}

    def run_what_is_left(self) -> None:
        """Run in further intervals what still waits."""
        segments = self.cooling.without.segments
        end = segments[-1].first_interval + segments[-1].intervals
        weights = {(i.slot, i.chunk): i for s in segments for i in s.body if (i.op, i.name) == ("run", "W")}
        for d in range(self.schedule.p):
            intervals = count(end)
            while self.waiting[d]:
                n = next(intervals)
                for _, instruction in sorted(weights.items()):
                    self._take(d, n, instruction)

    def _run(self, instruction: Instruction, track: Track) -> Callable[[int], None]:
        step = super()._run(instruction, track)
        if instruction.name == "B":
            return lambda n: (step(n), self._wait(track, n))
        if instruction.name != "W":
            return step
        takes = self.durations.of(self.schedule, "W", instruction.chunk)
        latest = self.cooling.latest[track.first_interval][:, track.line]

        def step_and_more(n: int) -> None:
            step(n)
            in_time = self.clock + (1 - self.late.delay) * takes <= latest[n] * (1 + 1e-12)
            for d, waiting in enumerate(self.waiting):
                may = waiting and (in_time[d] or len(waiting) >= self.late.carried)
                if may and self._take(d, track.first_interval + n, instruction):
                    self.clock[d] += takes[d]

        return step_and_more

    def _wait(self, track: Track, n: int) -> None:
        """Weight gradients of the B passes that have just run wait."""
        for d in np.flatnonzero(track.microbatch[n] >= 0).tolist():
            made = int(track.stages[d]), int(track.microbatch[n, d])
            if made in self.cooling.movable:
                self.waiting[d].append(made)

    def _take(self, d: int, interval: int, instruction: Instruction) -> bool:
        """Whether a weight gradient of the instruction's chunk waits on the device, and may run there."""
        slot, stage = self.cooling.slot(interval, instruction), int(self.stages[instruction.chunk][d])
        found = next((w for w in self.waiting[d] if w[0] == stage), None)
        if found is None or slot in self.busy[d]:
            return False
        self.waiting[d].remove(found)
        self.taken[found] = slot
        self.busy[d].add(slot)
        return True
