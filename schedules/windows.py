"""Warm-up one pass at a time, for schedules whose devices wait for each other to take a transfer.

In the steady state a microbatch takes its time from device to device, so that nobody waits for transfers. In the
warm-up that delays the first passes of all devices. So the warm-up is a scan of its own over short intervals,
*windows*, in each of which a device runs one pass at most. What it makes has arrived when the next window begins: a
microbatch crosses a device in each.

The order of passes is that of the repeated block, run as soon as inputs and memory allow (:mod:`.queues`). Passes of a
window are in its first slot, so that transfers behind it are one in each direction; W passes, which send nothing, are
in the second.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from .blocks import Block
from .queues import KINDS, B, F, Filling, Queues, Ran, Starts, W, orders_of
from .repeat import assembled
from .schedule import Schedule
from .vocabulary import insert, unsharded


@dataclass(frozen=True)
class Windows:
    """A block's repetition with a warm-up of so many windows; the vocabulary is not sharded."""

    block: Block
    count: int

    def schedule(self, method: str, m: int, name: str) -> Schedule:
        """The schedule of ``m`` microbatches, in the block's slots; the order that its windows need is not in it.

        Raises:
            ValueError: the steady state does not follow the windows.
        """
        block, vocabulary = insert(self.block, method, m)
        starts = _repeated(block, m)
        i, later, moved = _moved(block, self.count, min(m, 4 * block.p + 8))
        starts = {kind: np.concatenate([moved[kind], starts[kind][:, i:] + later], axis=1) for kind in KINDS}
        steps = unsharded(block.placement, starts["F"][0], starts["F"][-1], starts["B"][0])
        return assembled(block, replace(vocabulary, steps=steps), starts, name)


def busy(block: Block, count: int) -> float:
    """In what share of so many windows the first device has a pass to run."""
    starts = _repeated(block, 4 * block.p + 8)
    ran = _ran(block.placement, tuple(map(tuple, orders_of(block, starts))))
    return sum(d == block.placement[0] and now < count for now, d, _ in ran) / count


def _repeated(block: Block, m: int) -> Starts:
    shifts = np.array([block.shift(i) for i in range(m)])
    return {kind: np.array(getattr(block, kind))[:, None] + shifts for kind in KINDS}


@lru_cache(maxsize=512)
def _moved(block: Block, count: int, m: int) -> tuple[int, int, Starts]:
    """From which microbatch on all passes are as many slots later as in the repeated block, how many, and the slots of
    the passes before."""
    starts = _repeated(block, m)
    K, stages, moved = block.interval, len(block.placement), {kind: slots.copy() for kind, slots in starts.items()}
    names, latest, from_F_to_B = tuple(KINDS), [-1] * block.p, block.B[-1] - block.F[-1] - 1
    for now, d, (kind, stage, i) in _ran(block.placement, tuple(map(tuple, orders_of(block, starts)))):
        if now < count:
            slot = now * K + (kind == W)
        else:
            made = -1
            if kind == W:
                made = moved["B"][stage, i]
            elif kind == B and stage == stages - 1:
                made = moved["F"][stage, i] + from_F_to_B
            elif kind == B or stage:
                made = moved[names[kind]][stage - 1 if kind == F else stage + 1, i]
            after = max(latest[d], int(made), count * K - 1)
            slot = after + 1 + (int(starts[names[kind]][stage, 0]) - after - 1) % K
        moved[names[kind]][stage, i] = latest[d] = slot
    later = np.concatenate([moved[kind] - starts[kind] for kind in KINDS])
    steady = np.flatnonzero((later == later[0]).all(axis=0))
    if not len(steady):
        raise ValueError(f"the steady state does not follow {count} windows")
    i = int(steady[0])
    return i, int(later[0, i]), {kind: slots[:, :i] for kind, slots in moved.items()}


@lru_cache(maxsize=16)
def _ran(placement: tuple[int, ...], orders: tuple[tuple[Ran, ...], ...]) -> list[tuple[int, int, Ran]]:
    """The passes of these orders if each takes one slot and starts as soon as it can, by time, with the devices."""
    ones = {kind: np.ones(len(placement)) for kind in KINDS}
    return [(int(now), d, x) for now, d, x in Queues(placement, orders, ones, Filling()).run()]
