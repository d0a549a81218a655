"""Refuses a lowered program whose tables do not do what the schedule says.

Reads nothing but the program: replays which cell is written and read when, without the lowering's own bookkeeping.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from ..check import ScheduleError
from .program import Instruction, Program, Segment

Key = tuple[str, np.ndarray, np.ndarray]  # what a value is: "F" or "B" of a stage, of a microbatch
_OF_TAIL = ("ahead", "behind", "streams", "returned", "tail_residual", "tail_kept", "tail_carried")
_WRITES_P, _WRITES_X = ("S", "S1"), ("hidden_broadcast",)


def check_program(program: Program) -> None:
    """Checks every instruction's tables.

    Raises:
        ScheduleError: a pass that does not run once; a cell read before its value is written or after another has
            overwritten it; a transfer from a device that made nothing; a collective not the same on all devices.
    """
    replay = _Replay(program)
    for segment in program.segments:
        replay.segment(segment)
    replay.check_counts()
    replay.check_collectives()
    for ring, found in replay.touches.items():
        _check_ring(program, ring, found)


class _Replay:
    """Collects what every instruction writes and reads, with its time."""

    def __init__(self, program: Program):
        self.program, self.schedule = program, program.schedule
        s = self.schedule
        self.stage_of = s.stage_of
        self.touches: dict[str, list[tuple]] = defaultdict(list)
        self.counts: dict[tuple[str, int], np.ndarray] = defaultdict(lambda: np.zeros((s.p, s.m), int))
        self.time = 0
        self.under_way: dict[int, tuple] = {}
        self.ends: dict[str, list[tuple[int, str, int]]] = defaultdict(list)

    def segment(self, segment: Segment) -> None:
        made = np.full((segment.intervals, self.schedule.p, 3), -1)
        for n, instruction in enumerate(segment.body):
            times = self.time + np.arange(segment.intervals) * len(segment.body) + n
            self._instruction(instruction, times, made)
        if self.under_way:
            raise ScheduleError(f"transfers {sorted(self.under_way)} of a scan leave and never land")
        self.time += segment.intervals * len(segment.body)

    def _instruction(self, x: Instruction, times: np.ndarray, made: np.ndarray) -> None:
        """One instruction in all intervals; ``made`` is what a device made last in each: kind, stage, microbatch."""
        s = self.schedule
        rows, devices = np.nonzero(x.tables["microbatch"] >= 0)
        i = x.tables["microbatch"][rows, devices]

        def touch(ring: str, write: bool, way: str, stage: np.ndarray | int) -> None:
            cell = x.tables["deliver" if write and ring == "inbox" else ring][rows, devices]
            keys = ((0 if way == "F" else 1) * (s.stages + 2) + np.broadcast_to(stage, i.shape) + 1) * s.m + i
            keep = cell >= 0
            self.touches[ring].append(
                tuple(c[keep] for c in (devices, cell, times[rows], np.full(len(i), write), keys))
            )

        if x.op == "run":
            np.add.at(self.counts[x.name, x.chunk], (devices, i), 1)
        if x.op == "run" and x.name in ("F", "B", "W"):
            stage = self.stage_of[x.chunk][devices]
            if x.name != "W":
                made[rows, devices] = np.stack([np.full(len(i), x.name == "B"), stage, i], axis=1)
                touch("inbox", False, x.name, stage + (1 if x.name == "B" else -1))
                if "outbox" in x.tables:
                    touch("outbox", True, x.name, stage)
            self._stored(x, stage, touch)
            self._of_tail(x, touch)
        elif x.op == "keep":
            self._delivered(x, made, rows, devices, devices, i, times)
        elif x.op == "permute":
            sources, targets = zip(*x.pairs, strict=True)
            if len(set(sources)) < len(sources) or len(set(targets)) < len(targets):
                raise ScheduleError(
                    f"slot {x.slot}: a permute has pairs {x.pairs}; a device sends to one and receives from one"
                )
            source = dict(zip(targets, sources, strict=True))
            source_of = np.array([source.get(d, -1) for d in devices.tolist()], int)
            if "outbox" in x.tables:
                stage = self.stage_of[x.chunk][source_of]
                made = made.copy()
                made[rows, source_of] = np.stack([np.full(len(i), x.name == "B"), stage, i], axis=1)
                keys = ((x.name == "B") * (s.stages + 2) + stage + 1) * s.m + i
                cell = x.tables["outbox"][rows, source_of]
                self.touches["outbox"].append((source_of, cell, times[rows], np.zeros(len(i), bool), keys))
            self._delivered(x, made, rows, devices, source_of, i, times)
        elif x.op == "land":
            if x.transfer not in self.under_way:
                raise ScheduleError(f"slot {x.slot}: transfer {x.transfer} lands and has not left")
            self._arrived(*self.under_way.pop(x.transfer), times)
        if x.op in ("start", "done"):
            table = x.tables["microbatch"]
            if (table != table[:, :1]).any():
                raise ScheduleError(f"{x.op} {x.name} is for different microbatches on different devices")
            here = np.flatnonzero(table[:, 0] >= 0)
            self.ends[x.name] += zip(times[here].tolist(), [x.op] * len(here), table[here, 0].tolist(), strict=True)
        if x.name not in ("", "F", "B", "W") and x.op not in ("permute", "land"):
            self._vocabulary(x, touch)

    def _stored(self, x: Instruction, stage: np.ndarray, touch) -> None:
        """Activations: what F leaves and B and W take."""
        split = self.schedule.splits_backward
        if x.name == "F" and self.schedule.trains:
            touch("residual", True, "F", stage)
            if split:
                touch("kept", True, "F", stage)
        if x.name == "B":
            touch("residual", False, "F", stage)
            if split:
                touch("kept", False, "F", stage)
                touch("carried", True, "B", stage)
        if x.name == "W":
            touch("kept", False, "F", stage)
            touch("carried", False, "B", stage)

    def _of_tail(self, x: Instruction, touch) -> None:
        """What the last stage's passes leave and take for the tail."""
        writes = {"F": ("streams", "tail_residual", "tail_kept"), "B": ("behind", "tail_carried"), "W": ()}
        for ring in _OF_TAIL:
            if ring in x.tables:
                write = ring in writes[x.name]
                way = "B" if ring in ("behind", "returned", "tail_carried") else "F"
                touch(ring, write, way, 0)

    def _delivered(self, x: Instruction, made, rows, devices, sources, i, times) -> None:
        """A transfer writes what its source made last in this interval, or left in its outbox in the one before."""
        way, stage, microbatch = made[rows, sources].T
        wrong = np.flatnonzero((microbatch != i) | (sources < 0))
        if len(wrong):
            n = int(wrong[0])
            raise ScheduleError(
                f"device {devices[n]} receives microbatch {i[n]} in slot {x.slot} from device {sources[n]}, "
                "which has not just made it"
            )
        keys = (way * (self.schedule.stages + 2) + stage + 1) * self.schedule.m + i
        arrival = (devices, x.tables["deliver"][rows, devices], rows, keys)
        if x.op == "permute":
            self.under_way[x.transfer] = arrival
        else:
            self._arrived(*arrival, times)

    def _arrived(self, devices, cells, rows, keys, times) -> None:
        """What a transfer brings is in the inbox."""
        self.touches["inbox"].append((devices, cells, times[rows], np.ones(len(keys), bool), keys))

    def _vocabulary(self, x: Instruction, touch) -> None:
        s = self.schedule
        writes = {
            ("done", "embed_sum"): ("F", -1),
            ("run", "IF"): ("F", -1),
            ("run", "G"): ("B", s.stages),
            ("run", "H"): ("B", s.stages),
        }
        reads = {
            ("start", "hidden_broadcast"): ("F", s.stages - 1),
            ("run", "H"): ("F", s.stages - 1),
            ("start", "embed_grad_broadcast"): ("B", 0),
            ("run", "IB"): ("B", 0),
        }
        if "deliver" in x.tables:
            touch("inbox", True, *writes[x.op, x.name])
        if "inbox" in x.tables:
            touch("inbox", False, *reads[x.op, x.name])
        if "X" in x.tables:
            touch("X", x.name in _WRITES_X, "F", 0)
        for ring in ("ahead", "behind", "streams", "returned"):
            if ring in x.tables:
                touch(ring, ring in ("ahead", "returned"), "B" if ring in ("behind", "returned") else "F", 0)
        if "P" in x.tables:
            touch("P", x.op == "run" and x.name in _WRITES_P, "F", 0)

    def check_collectives(self) -> None:
        """Each starts and is done once for every microbatch, and is done before the next of its name starts."""
        for name, found in self.ends.items():
            ends = sorted(found)
            for n, ((_, op, i), expected) in enumerate(zip(ends, ("start", "done") * self.schedule.m, strict=False)):
                if op != expected or i != n // 2:
                    raise ScheduleError(
                        f"{op} {name} of microbatch {i} comes where {expected} {name} of {n // 2} should"
                    )
            if len(ends) != 2 * self.schedule.m:
                raise ScheduleError(f"{name} has {len(ends)} starts and dones; {2 * self.schedule.m} are needed")

    def check_counts(self) -> None:
        """Every pass runs once for every microbatch on the devices that have it."""
        for (name, chunk), count in self.counts.items():
            wrong = np.argwhere((count != 1) & (count.sum(axis=1, keepdims=True) > 0))
            if len(wrong):
                d, i = wrong[0].tolist()
                raise ScheduleError(f"device {d} runs {name} of chunk {chunk}, microbatch {i}, {count[d, i]} times")
        for kind in ("F",) + ("B",) * self.schedule.trains + ("W",) * self.schedule.splits_backward:
            for chunk in range(self.schedule.chunks):
                for d in np.flatnonzero(self.counts[kind, chunk].sum(axis=1) != self.schedule.m)[:1].tolist():
                    raise ScheduleError(f"device {d} does not run every {kind} of chunk {chunk}")


def _check_ring(program: Program, ring: str, found: list[tuple]) -> None:
    """Every read finds in its cell the value that it wants."""
    device, cell, time, write, key = (np.concatenate(columns) for columns in zip(*found, strict=True))
    too_far = np.flatnonzero(cell >= np.array(program.peaks[ring])[device])
    if len(too_far):
        d = int(device[too_far[0]])
        raise ScheduleError(
            f"device {d} uses cell {cell[too_far[0]]} of ring {ring!r}, which has {program.peaks[ring][d]}"
        )
    sort = np.lexsort((write, time, cell, device))
    device, cell, time, write, key = (c[sort] for c in (device, cell, time, write, key))
    group = np.flatnonzero(np.r_[True, (np.diff(device) != 0) | (np.diff(cell) != 0)])
    opens = np.repeat(group, np.diff(np.r_[group, len(device)]))
    latest = np.maximum.accumulate(np.where(write, np.arange(len(device)), -1))
    fresh = latest >= opens
    wrong = np.flatnonzero(~write & (~fresh | (key[np.maximum(latest, 0)] != key)))
    if len(wrong):
        n = int(wrong[0])
        stage, i = divmod(int(key[n]) % ((program.schedule.stages + 2) * program.schedule.m), program.schedule.m)
        raise ScheduleError(
            f"device {device[n]} reads cell {cell[n]} of ring {ring!r} for microbatch {i}, stage {stage - 1}, "
            f"where it {'finds another value' if fresh[n] else 'finds nothing'}"
        )
