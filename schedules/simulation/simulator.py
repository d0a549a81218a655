"""Times a lowered program with an event model of the compiled program, instruction by instruction.

Every device runs the same list of instructions in the same order, so the model is a vector of clocks, one per device,
carried through that list. Rules for the compiled program (:data:`COMPILED`):

* ``run`` takes its duration on devices whose table names a microbatch, and no time elsewhere;
* a ``permute`` is a rendezvous: both ends of each pair continue once both have arrived and the data has crossed, even
in intervals in which the pair carries nothing, because the program is the same in all of them;
* a collective begins when the last device has started it and the previous one has ended, and overlaps with passes; a
device waits for it at the program's ``done``.

:data:`ON_CPUS` makes collectives block as transfers do: XLA's CPU runtime runs one thing at a time. :data:`FREE` models
a framework with one process per device: a sender does not wait, a receiver waits where it uses the data, and nothing
runs that carries no data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ..instructions import STAGE_PASSES
from ..lowering.program import Instruction, Program, Segment
from .durations import Durations
from .timeline import Timeline, Track


@dataclass(frozen=True)
class Rules:
    """What waits for what.

    Attributes:
        transfers: "blocking": both ends of a permute wait for each other and for the data; "asynchronous": both
            continue and wait where the program lands it; "eager": the sender never waits, and a receiver only where it
            reads.
        collectives: "overlapping": devices continue and wait for the result at its "done"; "blocking": all wait at its
            "start" until it completes, as on CPUs.
        streams: how many a device has for communication. What shares a stream runs one after the other, in program
            order. With 2, one is for transfers and one for collectives, and each starts no earlier than those before it
            in the program. With 0 only collectives wait for each other.
        idle: whether transfers and collectives also run in intervals in which they carry nothing.
    """

    transfers: Literal["blocking", "asynchronous", "eager"] = "blocking"
    collectives: Literal["overlapping", "blocking"] = "overlapping"
    streams: Literal[0, 1, 2] = 0
    idle: bool = True


COMPILED = Rules()
GPU = Rules(transfers="asynchronous", streams=2)
ON_CPUS = Rules(collectives="blocking")
FREE = Rules(transfers="eager", idle=False)


MOMENTS = ("keep", "land", "done")  # instructions that take no time: they end when they start


def simulate(program: Program, durations: Durations | None = None, rules: Rules = COMPILED) -> Timeline:
    """When every pass, transfer and collective of one iteration runs; by default F=1, B=2 and everything else 0.

    Time and memory grow with intervals x instructions x devices; p=64, m=512 takes about a second.
    """
    engine = Engine(program, durations or Durations(), rules)
    for segment in program.segments:
        engine.run(segment)
    return Timeline(program, tuple(engine.tracks), engine.clock.copy())


def steady_interval(program: Program, durations: Durations, rules: Rules, intervals: int = 16) -> float:
    """Time per microbatch in the steady state: the program's fullest interval, repeated until the clocks settle.

    Ignores warm-up and cool-down, so it takes a tenth of the time of :func:`simulate`.
    """
    counts = [sum((i.tables["microbatch"] >= 0).sum(1) for i in s.body if i.op == "run") for s in program.segments]
    k = int(np.argmax([of_segment.max() for of_segment in counts]))
    n = int(np.argmax(counts[k]))
    body = tuple(
        replace(i, tables={name: np.repeat(table[n : n + 1], intervals, axis=0) for name, table in i.tables.items()})
        for i in program.segments[k].body
    )
    engine = Engine(program, durations, rules)
    ends = []
    for _ in range(2):
        engine.run(Segment(0, intervals, body))
        ends.append(float(engine.clock.max()))
    stage_passes = [i.tables["microbatch"][0] >= 0 for i in body if i.op == "run" and i.name in STAGE_PASSES]
    of_microbatch = sum(map(len, program.schedule.passes)) / program.schedule.m
    microbatches = max(1, round(sum(map(np.sum, stage_passes)) / of_microbatch))
    return (ends[1] - ends[0]) / intervals / microbatches


class Engine:
    """The clocks of all devices, carried through the program."""

    def __init__(self, program: Program, durations: Durations, rules: Rules):
        self.schedule, self.durations, self.rules = program.schedule, durations, rules
        p = self.schedule.p
        transfer = np.asarray(durations.transfer, float)
        if transfer.shape not in ((), (p, p)):
            raise ValueError(f"transfer has shape {transfer.shape}; give one number, or one per pair, ({p}, {p})")
        self.transfer = np.broadcast_to(transfer, (p, p))
        self.devices = np.arange(p)
        self.stages = self.schedule.stage_of
        self.clock = np.zeros(p)
        streams = np.zeros((max(1, rules.streams), p))  # when each becomes free
        self.transfer_stream, self.collective_stream = streams[0], streams[-1]
        self.launched = np.zeros(p)  # when the latest transfer or collective of each device began there
        self.arrival = np.zeros((p, max(1, program.rings.get("inbox", 0))))
        self.collectives_end = 0.0  # two collectives over the same devices do not overlap
        self.pending: dict[str, float] = {}
        self.tracks: list[Track] = []

    def run(self, segment: Segment) -> None:
        """One scan."""
        self.under_way: dict[int, np.ndarray] = {}  # for every transfer in flight, its end on each device
        self.transfers: list[tuple[Track, np.ndarray, ...]] = []
        steps = [self._step(instruction, segment, line) for line, instruction in enumerate(segment.body)]
        for n in range(segment.intervals):
            for step in steps:
                step(n)
        for track, source, target, started, takes in self.transfers:
            for ends in (source, target):
                track.start[:, ends], track.end[:, ends] = started, started + takes

    def _step(self, instruction: Instruction, segment: Segment, line: int) -> Callable[[int], None]:
        """The effect of one instruction in interval n, with a track that records when it ran."""
        shape = (segment.intervals, self.schedule.p)
        tables, start = {"microbatch": np.full(shape, -1, np.int32)} | dict(instruction.tables), np.zeros(shape)
        track = Track(
            instruction.op,
            instruction.name,
            self.stages[instruction.chunk],
            tables,
            segment.first_interval,
            line,
            start,
            start if instruction.op in MOMENTS else np.zeros(shape),
        )
        self.tracks.append(track)
        makers = {
            "run": self._run,
            "permute": self._permute,
            "land": self._land,
            "keep": self._keep,
            "start": self._start,
            "done": self._done,
        }
        return makers[instruction.op](instruction, track)

    def _run(self, instruction: Instruction, track: Track) -> Callable[[int], None]:
        takes = self.durations.of(self.schedule, instruction.name, instruction.chunk) * (track.microbatch >= 0)
        overhead = self.durations.overhead if self.rules.idle else 0.0
        waits = self._reads_inbox(track)

        def step(n: int) -> None:
            began = track.start[n]
            np.add(self.clock, overhead, out=began)
            if waits:
                np.maximum(began, self._arrived(track, n), out=began)
            self.clock = np.add(began, takes[n], out=track.end[n])

        return step

    def _keep(self, instruction: Instruction, track: Track) -> Callable[[int], None]:
        cells = track.tables["deliver"]

        def step(n: int) -> None:
            track.start[n] = self.clock
            self.arrival[self.devices[cells[n] >= 0], cells[n][cells[n] >= 0]] = 0.0

        return step

    def _permute(self, instruction: Instruction, track: Track) -> Callable[[int], None]:
        source, target = np.array(instruction.pairs, int).T
        takes = self.transfer[source, target]
        mode, shared = self.rules.transfers, self.rules.streams > 0
        involved = np.union1d(source, target)
        pairs = len(source)
        self.transfers.append((track, source, target, started := np.zeros((len(track.microbatch), pairs)), takes))
        ends = np.zeros(pairs + 1)  # of every pair, and of none
        sends, receives = np.full((2, self.schedule.p), pairs)
        sends[source], receives[target] = np.arange(pairs), np.arange(pairs)

        def step(n: int) -> None:
            free = self._stream_free(self.transfer_stream) if shared else self.clock
            ready = started[n]
            if mode == "eager":
                np.add(free[source], takes, out=ends[:-1])
                ready[:] = free[source]
                self.under_way[instruction.transfer] = ends[receives]
                return
            np.maximum(free[source], free[target], out=ready)
            np.add(ready, takes, out=ends[:-1])
            until = np.maximum(ends[sends], ends[receives])
            if shared:
                np.maximum(self.transfer_stream, until, out=self.transfer_stream)
                self.launched[involved] = free[involved]
            if mode == "blocking":
                self.clock = np.maximum(self.clock, until)
            else:
                self.under_way[instruction.transfer] = until

        return step

    def _land(self, instruction: Instruction, track: Track) -> Callable[[int], None]:
        cells = track.tables["deliver"]
        mode = self.rules.transfers

        def step(n: int) -> None:
            if mode == "asynchronous":
                self.clock = np.maximum(self.clock, self.under_way.pop(instruction.transfer))
            elif mode == "eager":
                here = cells[n] >= 0
                self.arrival[self.devices[here], cells[n][here]] = self.under_way.pop(instruction.transfer)[here]
            track.start[n] = self.clock

        return step

    def _start(self, instruction: Instruction, track: Track) -> Callable[[int], None]:
        takes = getattr(self.durations, instruction.name) if self.schedule.p > 1 else 0.0
        runs = (track.microbatch >= 0).any(axis=1) | self.rules.idle
        shared = self.rules.streams > 0

        def step(n: int) -> None:
            if runs[n]:
                free = self._stream_free(self.collective_stream) if shared else self.clock
                ready = np.maximum(free, self._arrived(track, n)).max()
                begin = max(float(ready), self.collectives_end)
                self.collectives_end = self.pending[instruction.name] = begin + takes
                if shared:
                    self.launched = free
                    self.collective_stream[:] = begin + takes
                track.start[n], track.end[n] = begin, begin + takes
                if self.rules.collectives == "blocking":
                    self.clock = np.full_like(self.clock, begin + takes)

        return step

    def _done(self, instruction: Instruction, track: Track) -> Callable[[int], None]:
        runs = (track.microbatch >= 0).any(axis=1) | self.rules.idle

        def step(n: int) -> None:
            if runs[n]:
                self.clock = np.maximum(self.clock, self.pending.get(instruction.name, 0.0))
            track.start[n] = self.clock

        return step

    def _stream_free(self, stream: np.ndarray) -> np.ndarray:
        """When each device could begin what comes next on a stream."""
        return np.maximum(np.maximum(self.clock, stream), self.launched)

    def _reads_inbox(self, track: Track) -> bool:
        return self.rules.transfers == "eager" and "inbox" in track.tables

    def _arrived(self, track: Track, n: int) -> np.ndarray | float:
        """When the inbox values that an instruction reads have arrived, ``[p]``; a rendezvous has already waited."""
        if not self._reads_inbox(track):
            return 0.0
        cells = track.tables["inbox"][n]
        return np.where(cells >= 0, self.arrival[self.devices, cells], 0.0)
