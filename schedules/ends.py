"""Warm-up and cool-down where no device waits for another to take a transfer: other passes where it would only wait.

A repeated block fills the pipeline at the pace of its steady state. A device that waits in the warm-up can run forwards
of its first chunk early if it has memory for them; one that waits in the cool-down has run weight gradients too early
that nothing needs. :mod:`.queues` runs the repeated block in real time and within its memory to find who would wait.
Passes move by whole intervals: each keeps its slot of the interval and so its instruction; the steady state stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from .blocks import Block
from .queues import KINDS, B, F, Filling, Queues, Ran, Starts, W, orders_of
from .repeat import assembled
from .schedule import Schedule
from .vocabulary import insert, unsharded


def _moved(block: Block, starts: Starts, taken: list[tuple[float, int, Ran]]) -> Starts:
    """Slots in which the devices come to these orders.

    Passes are placed in the order in which they start, each in the first slot of its own, ``K`` apart, behind its input
    and behind the pass before it on its device. Until the first stage's first B, they also do not come before forwards
    of the first stage that start earlier: intervals are short there, and devices that are in the same one wait for each
    other. W passes behind a device's last F may take the slots that other devices have for them.
    """
    K, names, stages, never = block.interval, tuple(starts), len(block.placement), -(1 << 60)
    moved = {kind: slots.copy() for kind, slots in starts.items()}
    release = block.B[-1] - block.F[-1] - 1
    latest, opened, warming = [never] * block.p, never, True
    forwards = [starts["F"].shape[1] * block.placement.count(d) for d in range(block.p)]
    for _, d, x in taken:
        kind, stage, i = x
        if kind == W:
            made = int(moved["B"][stage, i])
        elif kind == B and stage == stages - 1:
            made = int(moved["F"][stage, i]) + release
        elif kind == F and stage == 0:
            made = never
        else:
            made = int(moved[names[kind]][stage - 1 if kind == F else stage + 1, i])
        after = max(latest[d], made, opened if warming and x[:2] != (F, 0) else never)
        own = int(starts[names[kind]][stage, 0]) % K
        slots = _usual(block, stage) if kind == W and not forwards[d] else (own,)
        if after == never:
            slot = int(starts[names[kind]][stage, i])
        else:
            slot = min(after + 1 + (slot - after - 1) % K for slot in slots)
        moved[names[kind]][stage, i] = latest[d] = slot
        forwards[d] -= kind == F
        if x[:2] == (F, 0):
            opened = slot
        warming = warming and x[:2] != (B, 0)
    return moved


@lru_cache(maxsize=1024)
def _usual(block: Block, stage: int) -> tuple[int, ...]:
    """Slots of the interval in which any device has a W of this stage's chunk: there is an instruction for it."""
    chunks = [block.placement[:s].count(d) for s, d in enumerate(block.placement)]
    return tuple(sorted({t % block.interval for t, c in zip(block.W, chunks, strict=True) if c == chunks[stage]}))


@dataclass(frozen=True)
class Ends:
    """A block's repetition with its ends filled; the vocabulary is not sharded.

    Attributes:
        block, filling: what, and how.
        durations: of F, B and W, ``[stages]``.
        transfer, gap: time of a transfer, and from the last stage's F to when its B can start.
    """

    block: Block
    filling: Filling
    durations: Mapping[str, np.ndarray]
    transfer: float
    gap: float

    def schedule(self, method: str, m: int, name: str) -> Schedule:
        """The schedule of ``m`` microbatches."""
        block, vocabulary = insert(self.block, method, m)
        shifts = np.array([block.shift(i) for i in range(m)])
        starts = self._starts({kind: np.array(getattr(block, kind))[:, None] + shifts for kind in KINDS})
        steps = unsharded(block.placement, starts["F"][0], starts["F"][-1], starts["B"][0])
        return assembled(block, replace(vocabulary, steps=steps), starts, name)

    def _starts(self, starts: Starts) -> Starts:
        """The slots of every pass; a long iteration has the ends of a short one."""
        m, probe = starts["F"].shape[1], 4 * self.block.p + 8
        if m <= probe:
            return self._filled(starts)
        moved = self._filled({kind: slots[:, :probe] for kind, slots in starts.items()})
        half, more = probe // 2, self.block.interval * (m - probe)
        return {
            kind: np.concatenate(
                [
                    slots[:, :half],
                    slots[:, half : half + 1] + np.arange(0, more, self.block.interval),
                    slots[:, half:] + more,
                ],
                axis=1,
            )
            for kind, slots in moved.items()
        }

    def _filled(self, starts: Starts) -> Starts:
        orders = orders_of(self.block, starts)
        queues = Queues(self.block.placement, orders, self.durations, self.filling, self.transfer, self.gap)
        return _moved(self.block, starts, queues.run())
