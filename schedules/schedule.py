"""The schedule: plain data on a grid of unit slots.

Symbols, as in the paper: ``p`` pipeline devices, ``d`` one of them, ``m`` microbatches, ``i`` one of them. Passes:
``F`` forward, ``B`` backward (only the input gradient if a ``W`` pass follows), ``W`` weight gradient. A *stage* is a
consecutive run of layers; device ``placement[stage]`` holds it. Time is counted in slots: a pass takes a whole number
of them, and its result can be used from the slot after its last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

Op = Literal["run", "start", "done"]
MOST_PASSES = 2**19
"""Limit on stages times microbatches for what a command builds: a schedule lists every pass, and this many take about a
minute."""


class Pass(NamedTuple):
    """One pass on one device: ``kind`` of ``stage`` for ``microbatch``, in slots ``start .. start + slots - 1``."""

    kind: str
    stage: int
    microbatch: int
    start: int
    slots: int = 1

    @property
    def last(self) -> int:
        """The last slot that the pass takes; its result can be used from the next."""
        return self.start + self.slots - 1

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


# Where in its slot an event is. A collective's result lands before the slot's transfers leave: only one thing is in
# flight between two devices at a time.
DEFERRED, BEFORE, PASSES, LANDINGS, TRANSFERS, AFTER = range(6)


@dataclass(frozen=True)
class Step:
    """One step of the vocabulary layers for microbatch 0; microbatch i has it :attr:`Vocabulary.shifts` ``[i]`` later.

    ``run`` steps are passes (S, T, IF, ...), with one slot position per device, or None on a device that takes no part.
    ``start`` and ``done`` are the two ends of a collective, at the same place on every device. The ``place`` of a step
    in its slot is before the passes that end there, between them and the slot's transfers, or after both. It may have
    its own ``shifts``, as the input layer's steps do when warm-up and cool-down are reordered.
    """

    op: Op
    name: str
    at: tuple[int | None, ...]
    place: int = AFTER
    shifts: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Vocabulary:
    """How the embedding and the LM head are computed: by which method, and when.

    Attributes:
        method: its name; used only in messages.
        steps: ordered: if two share a place in a slot, the earlier in the tuple goes first.
        shifts: slots from microbatch 0's steps to each microbatch's, multiples of the block's interval.
        inserted_intervals: intervals between the last stage's F and B in addition to the block's own.
    """

    method: str
    steps: tuple[Step, ...]
    shifts: tuple[int, ...]
    inserted_intervals: int = 0


@dataclass(frozen=True)
class Order:
    """The program order within a slot, which the schedule itself leaves open.

    Attributes:
        passes: for some slots of the interval, the order of their passes, each a kind and a chunk such as ("B", 1);
            passes that are not named follow, in alphabetical order.
        transfers: transfers leave "behind passes", each after the pass that produced it; or "before passes", each with
            others before the next pass of its source or target; or "behind slots", all of a slot together. Each takes
            fewer instructions than the one before.
        ends_apart: 0 for as few scans as possible; 1 if warm-up and cool-down may be scans of their own, without the
            idle transfers and collectives of the steady state; 2 if they may be even where that takes much more code.
        deferred: passes whose transfers leave at the beginning of the next interval instead, each a slot, a kind and a
            chunk.
        merged: unless transfers leave behind slots, those that leave together share an instruction if they land at most
            so many instructions apart. It lands where the first of them must.
        windows: so many of the first intervals are a scan of their own, with transfers behind slots; see
            :mod:`.windows`.
    """

    passes: tuple[tuple[int, tuple[tuple[str, int], ...]], ...] = ()
    transfers: Literal["behind passes", "before passes", "behind slots"] = "behind slots"
    ends_apart: Literal[0, 1, 2] = 0
    deferred: frozenset[tuple[int, str, int]] = frozenset()
    merged: int = 0
    windows: int = 0

    def ranks(self, interval: int, words: Sequence[str], chunks: int) -> np.ndarray:
        """The rank of every (slot, word, chunk) among the passes of its slot, ``[interval, words, chunks]``."""
        usual = np.arange(len(words) * chunks).reshape(len(words), chunks)
        ranks = np.broadcast_to(usual + usual.size, (interval, *usual.shape)).copy()
        for slot, kinds in self.passes:
            for n, (kind, chunk) in enumerate(kinds):
                if kind in words:
                    ranks[slot, words.index(kind), chunk] = n
        return ranks

    def defers(self, interval: int, words: Sequence[str], chunks: int) -> np.ndarray:
        """Whether the transfers of every (slot, word, chunk) are deferred, ``[interval, words, chunks]``."""
        found = np.zeros((interval, len(words), chunks), bool)
        for slot, kind, chunk in self.deferred:
            found[slot, words.index(kind), chunk] = True
        return found


@dataclass(frozen=True)
class Schedule:
    """Every pass of one training (or evaluation) iteration, and when the vocabulary layers run between them.

    Attributes:
        name: for display only.
        p, m: devices and microbatches.
        interval: slots of a scan step: one period of the steady state, or two (K).
        placement: the device of every stage, in depth order.
        passes: for every device, its passes in order of start.
        vocabulary: when the sharded (or unsharded) vocabulary layers run.
        layer_counts: layers per stage, or None for an even split.
        order: the program order within slots.
        depths: tokens beyond the next that the last stage's passes also predict.
    """

    name: str
    p: int
    m: int
    interval: int
    placement: tuple[int, ...]
    passes: tuple[tuple[Pass, ...], ...]
    vocabulary: Vocabulary
    layer_counts: tuple[int, ...] | None = None
    order: Order = Order()
    depths: int = 0
    _chunks: tuple[int, ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        if self.p < 1 or self.m < 1:
            raise ValueError(f"p is {self.p} and m is {self.m}; a pipeline needs at least 1 device and 1 microbatch")
        if len(self.passes) != self.p:
            raise ValueError(f"passes are given for {len(self.passes)} devices; p is {self.p}")
        seen: dict[int, int] = {}
        chunks = []
        for stage, device in enumerate(self.placement):
            if not 0 <= device < self.p:
                raise ValueError(f"placement puts stage {stage} on device {device}; devices are 0 to {self.p - 1}")
            chunks.append(seen.get(device, 0))
            seen[device] = seen.get(device, 0) + 1
        if len(set(seen.values())) != 1 or len(seen) != self.p:
            raise ValueError(
                f"placement {self.placement} gives devices different numbers of stages; use the same for all"
            )
        object.__setattr__(self, "_chunks", tuple(chunks))

    @property
    def method(self) -> str:
        """The vocabulary method's name."""
        return self.vocabulary.method

    @property
    def stages(self) -> int:
        """The number of stages over all devices."""
        return len(self.placement)

    @property
    def chunks(self) -> int:
        """Stages per device."""
        return self.stages // self.p

    def chunks_of(self, stages: np.ndarray) -> np.ndarray:
        """The chunk index of each stage on its device; 0 for -1, which is no stage."""
        return np.array((*self._chunks, 0))[stages]

    def chunk(self, stage: int) -> int:
        """The chunk index of a stage on its device."""
        return self._chunks[stage]

    @property
    def sharded(self) -> bool:
        """Whether the vocabulary layers are sharded over all devices."""
        return any(step.op == "start" for step in self.vocabulary.steps)

    @property
    def opens(self) -> int:
        """A slot that opens an interval.

        It is the slot where the broadcast of the last stage's output starts before passes, so that no scan step
        boundary cuts it; else slot 0.
        """
        starts = (
            s.at[0] for s in self.vocabulary.steps if (s.op, s.name, s.place) == ("start", "hidden_broadcast", BEFORE)
        )
        return next(starts, 0)

    @property
    def sums_before_T(self) -> bool:
        """Whether the sum of input gradients starts before T, from what S left (Algorithm 2)."""
        place = {
            (s.op, s.name): (max(t for t in s.at if t is not None), s.place, n)
            for n, s in enumerate(self.vocabulary.steps)
        }
        T, total = place.get(("run", "T")), place.get(("start", "grad_sum"))
        return T is not None and total is not None and T > total

    @cached_property
    def stage_of(self) -> np.ndarray:
        """The stage for each chunk of each device, ``[chunks, p]``."""
        stages = np.zeros((self.chunks, self.p), int)
        for stage, device in enumerate(self.placement):
            stages[self.chunk(stage), device] = stage
        return stages

    @property
    def splits_backward(self) -> bool:
        """Whether weight gradients are separate passes."""
        return any(x.kind == "W" for x in self.passes[0])

    @property
    def trains(self) -> bool:
        """Whether there is a backward at all."""
        return any(x.kind == "B" for x in self.passes[0])
