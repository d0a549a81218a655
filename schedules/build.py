"""From a name to a schedule: the building block, the vocabulary passes, the repetition."""

from __future__ import annotations

from . import blocks
from .blocks import Block
from .schedule import Schedule
from .vocabulary import METHODS, insert

_BLOCKS = {"1f1b": blocks.one_f_one_b}
SCHEDULES = tuple(_BLOCKS)


def build(schedule: str = "1f1b", method: str = "vocab-2", *, p: int, m: int) -> Schedule:
    """The named schedule with the named vocabulary method, for ``p`` devices and ``m`` microbatches.

    Raises:
        ValueError: an unknown name, or a combination that makes no sense, with those that do.
    """
    if schedule not in _BLOCKS:
        raise ValueError(f"schedule is {schedule!r}; the schedules are {', '.join(SCHEDULES)}")
    return repeat(_BLOCKS[schedule](p), method, m, name=schedule)


def repeat(block: Block, method: str, m: int, name: str = "custom") -> Schedule:
    """A schedule from a building block: room for the vocabulary passes, then ``m`` copies an interval apart."""
    block, vocabulary = insert(block, method)
    passes = tuple(tuple(sorted((x for i in range(m) for x in block.passes(d, i)), key=lambda x: x.start))
                   for d in range(block.p))
    return Schedule(name, block.p, m, block.interval, block.placement, passes, vocabulary)


def evaluation(schedule: Schedule) -> Schedule:
    """Forward passes only, on the same stages: what evaluates the loss and keeps no activations."""
    raise NotImplementedError
