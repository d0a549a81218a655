"""A schedule from a building block: the block with room for the vocabulary passes, repeated for every microbatch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .blocks import Block
from .schedule import Pass, Schedule, Vocabulary
from .vocabulary import insert


def repeat(
    block: Block, method: str, m: int, name: str = "custom", inserted: int | None = None, overlap: bool = True
) -> Schedule:
    """A schedule from a building block: room for the vocabulary passes, then ``m`` copies an interval apart.

    Raises:
        ValueError: an unknown method, or fewer ``inserted`` intervals than its passes need.
    """
    block, vocabulary = insert(block, method, m, inserted, overlap)
    if inserted is not None and vocabulary.inserted_intervals != inserted:
        raise ValueError(
            f"inserted is {inserted}; {method} on this block needs {vocabulary.inserted_intervals} intervals or more"
        )
    shifts = np.array([block.shift(i) for i in range(m)])
    starts = {kind: np.array(getattr(block, kind))[:, None] + shifts for kind in "FBW" if getattr(block, kind)}
    return assembled(block, vocabulary, starts, name)


def assembled(block: Block, vocabulary: Vocabulary, starts: Mapping[str, np.ndarray], name: str) -> Schedule:
    """A schedule from the slots of every pass, by kind, ``[stages, m]``."""
    passes: list[list[Pass]] = [[] for _ in range(block.p)]
    for kind, slots in starts.items():
        takes = block.backward_slots if kind == "B" else 1
        for stage, device in enumerate(block.placement):
            passes[device] += [Pass(kind, stage, i, slot, takes) for i, slot in enumerate(slots[stage].tolist())]
    ordered = tuple(tuple(sorted(of_device, key=lambda x: x.start)) for of_device in passes)
    m = starts["F"].shape[1]
    return Schedule(name, block.p, m, block.interval, block.placement, ordered, vocabulary)
