"""Warm-up and cool-down reordered: the block's passes as early as inputs and the same memory peaks allow.

:mod:`.greedy` runs the passes in slots of real time. Here they are put on the grid of intervals that a program needs:
an interval opens with a hidden_broadcast, and holds at most one F of the first stage and one B, since the input layer
runs once in it. Where it has fewer slots of passes than others the rest stays empty, and takes no time. The steady
state that the list scheduling falls into repeats an interval as the block does, so it lowers to the body of one scan.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from math import inf

import numpy as np

from .blocks import Block
from .greedy import B, Bounds, F, Greedy, W
from .schedule import Pass, Schedule, Step, Vocabulary
from .vocabulary import input_delay, insert, sum_slots, unsharded

LONG = 4096  # devices times microbatches from which on the search looks at fewer microbatches
_KINDS = {F: "F", B: "B", W: "W"}


def reorder(block: Block, method: str, m: int, name: str = "custom", inserted: int | None = None) -> Schedule | None:
    """The block repeated ``m`` times with a method's vocabulary passes, and both ends reordered.

    Several orders of preference are tried, the one that takes the fewest slots wins. None where none of them takes
    fewer than the repeated block, which happens where its memory is very tight. With fewer ``inserted`` intervals than
    published passes wait longer for memory.

    Raises:
        ValueError: a block without W passes or with passes of more than one slot.
    """
    if not can_reorder(block):
        raise ValueError(
            "the block has no W, or a B of several slots; reordering takes blocks of F, B and W in one slot each"
        )
    plain, vocabulary = insert(block, method, m, inserted)
    bounds = Bounds(plain if inserted is None else block.delayed_backward(inserted * block.interval))
    # A long iteration is a short one with more steady state.
    probe = m if m * block.p <= LONG else min(m, max(32, 2 * block.p))
    cost, best = min((_run(plain, vocabulary, bounds, probe, ranks)[0], n) for n, ranks in enumerate(_ranks(block)))
    if cost[0] >= _occupied(plain, probe):
        return None
    _, engine, starts = _run(plain, vocabulary, bounds, m, _ranks(block)[best])
    if starts is None:
        return None
    grid = _Grid.of(plain, engine, starts)
    steps, shifts = _steps(plain, vocabulary, grid)
    passes = [
        [
            Pass(_KINDS[kind], stage, i, slot)
            for kind, starts in grid.starts.items()
            for stage in np.flatnonzero(engine.device == d).tolist()
            for i, slot in enumerate(starts[stage].tolist())
        ]
        for d in range(block.p)
    ]
    return Schedule(
        name,
        block.p,
        m,
        block.interval,
        block.placement,
        tuple(tuple(sorted(of_device, key=lambda x: x.start)) for of_device in passes),
        Vocabulary(method, steps, shifts, vocabulary.inserted_intervals if inserted is None else inserted),
    )


def can_reorder(block: Block) -> bool:
    """Whether the block has F, B and W passes, of one slot each."""
    return bool(block.W) and block.longest == 1


def _run(
    block: Block, vocabulary: Vocabulary, bounds: Bounds, m: int, ranks: list[int]
) -> tuple[tuple[float, int, int], Greedy, dict[int, np.ndarray] | None]:
    """One list schedule, and what it costs: slots, then intervals, then places of passes inside an interval."""
    engine = Greedy(block, m, _released(block, vocabulary))
    starts = engine.run(ranks, bounds, limit=_occupied(block, m))
    if starts is None:
        return (inf, 0, 0), engine, None
    begins = np.array(engine.opened) if engine.broadcast else np.arange(0, engine.slots, block.interval)
    places = sum(
        len(np.unique(times - begins[np.searchsorted(begins, times, side="right") - 1]))
        for stages in starts.values()
        for times in stages
    )
    return (engine.slots, len(begins), places), engine, starts


def _occupied(block: Block, m: int) -> int:
    """Slots of the repeated block in which any device runs a pass."""
    slots = np.unique([start for starts in (block.F, block.B, block.W) for start in starts])
    return len(np.unique(slots[:, None] + np.array([block.shift(i) for i in range(m)])))


def _ranks(block: Block) -> list[list[int]]:
    """Ranks of (kind, chunk): forwards that free the early chunks' successors first, weight gradients last."""
    chunks = len(block.placement) // block.p
    first, later = [(F, 0)], [(F, c) for c in range(chunks - 1, 0, -1)]
    down, rest = [(B, 0)], [(B, c) for c in range(1, chunks)]
    weights = [(W, c) for c in range(chunks)]
    orders = [
        kinds + last
        for last in (weights, weights[::-1])
        for kinds in (
            later + first + down + rest,
            later + down + first + rest,
            later + down + rest + first,
            down + later + first + rest,
            down + rest + later + first,
        )
    ]
    return [
        [order.index((kind, chunk)) for kind in (F, B, W) for chunk in range(chunks)]
        for order in dict.fromkeys(map(tuple, orders))
    ]


def _released(block: Block, vocabulary: Vocabulary) -> int | None:
    """Slots from hidden_broadcast to the last in which the input gradient's sum is under way."""
    done = next((s.at[0] for s in vocabulary.steps if (s.op, s.name) == ("start", "grad_sum")), None)
    return None if done is None else done - (block.F[-1] + 1)


# --- the grid --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Grid:
    """Slots of the program for every pass; ``broadcast`` is that of each microbatch's broadcast, if any."""

    starts: dict[int, np.ndarray]
    broadcast: np.ndarray | None

    @classmethod
    def of(cls, block: Block, engine: Greedy, starts: dict[int, np.ndarray]) -> _Grid:
        """Puts slots of real time on the grid."""
        if engine.released is None:
            return cls(starts, None)
        K = block.interval
        once = sorted((int(t), kind) for kind in (F, B) for t in starts[kind][0])
        begins, opener = _split(K, engine, once)
        ends = np.r_[begins[1:], engine.slots]
        usual = {kind: _usual(begins, starts[kind][0], opener) for kind in (F, B)}
        offset = np.zeros(len(begins), int)
        for t, kind in once:
            n = int(np.searchsorted(begins, t, side="right")) - 1
            if n not in opener and not offset[n]:
                offset[n] = min(max(0, usual[kind] - (t - begins[n])), K - (ends[n] - begins[n]))
        slot_of = np.concatenate(
            [np.arange(a, b) - a + n * K + offset[n] for n, (a, b) in enumerate(zip(begins, ends, strict=True))]
        )
        at = np.array(engine.opened)[engine.broadcast]
        return cls({kind: slot_of[times] for kind, times in starts.items()}, slot_of[at])


def _split(K: int, engine: Greedy, once: list[tuple[int, int]]) -> tuple[np.ndarray, set[int]]:
    """First slots of intervals with at most one F of the first stage and one B, and which of them a broadcast opens."""
    opened = [*engine.opened, *range(engine.opened[-1] + K, engine.slots, K)]
    broadcasts = {engine.opened[n] for n in engine.broadcast}
    begins: list[int] = []
    events = iter([*once, (engine.slots, -1)])
    t, kind = next(events)
    for a, b in zip(opened, [*opened[1:], engine.slots], strict=True):
        begins.append(a)
        seen: set[int] = set()
        while t < b:
            if kind in seen:
                begins.append(t)
                seen = set()
            seen.add(kind)
            t, kind = next(events)
    return np.array(begins), {n for n, a in enumerate(begins) if a in broadcasts}


def _usual(begins: np.ndarray, times: np.ndarray, opener: set[int]) -> int:
    """The commonest offset of a pass in the intervals that hidden_broadcast opens."""
    n = np.searchsorted(begins, times, side="right") - 1
    offsets = [int(t - begins[k]) for t, k in zip(times, n.tolist(), strict=True) if k in opener]
    return Counter(offsets).most_common(1)[0][0] if offsets else 0


# --- steps of the vocabulary layers ----------------------------------------------------------------------------------


def _steps(block: Block, vocabulary: Vocabulary, grid: _Grid) -> tuple[tuple[Step, ...], tuple[int, ...]]:
    """The block's steps where the reordered passes need them, and the shifts of the output layer's."""
    if grid.broadcast is None:
        first, last = grid.starts[F][0], grid.starts[F][-1]
        return unsharded(block.placement, first, last, grid.starts[B][0]), _from_first(last)
    K, opens = block.interval, block.F[-1] + 1
    shifts, first = _from_first(grid.broadcast), int(grid.broadcast[0])
    output = [
        replace(s, at=tuple(None if t is None else t - opens + first for t in s.at))
        for s in vocabulary.steps
        if s.name not in ("IF", "embed_sum", "embed_grad_broadcast", "IB")
    ]
    start = next(s.at[0] for s in output if (s.op, s.name) == ("start", "grad_sum"))
    closes = start + K - 1 - (start - first) % K
    done = min(closes, first + int((grid.starts[B][-1] - grid.broadcast).min()) - 1)
    output = [_moved(s, done) if (s.op, s.name) in (("done", "grad_sum"), ("run", "G")) else s for s in output]
    moved = _input_slots(K, grid.starts[F][0], grid.starts[B][0])
    layers = [
        _moved(s, int(moved[s.op, s.name][0]), _from_first(moved[s.op, s.name]))
        for s in vocabulary.steps
        if (s.op, s.name) in moved
    ]
    return (*output, *layers), shifts


def _moved(step: Step, slot: int, shifts: tuple[int, ...] | None = None) -> Step:
    return replace(step, at=tuple(None if t is None else slot for t in step.at), shifts=shifts or step.shifts)


def _from_first(slots: np.ndarray) -> tuple[int, ...]:
    return tuple((slots - slots[0]).tolist())


def _input_slots(K: int, F0: np.ndarray, B0: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
    """For every microbatch the slots of the input layer's steps, once an interval: as late and as early as can be."""
    F_usual, B_usual = (Counter((starts % K).tolist()).most_common(1)[0][0] for starts in (F0, B0))
    behind = (F_usual - 1 - input_delay(K, F_usual - 1, -1)) % K
    ahead = (B_usual + 1 + input_delay(K, B_usual + 1, 1)) % K
    i, slots = np.arange(len(F0)), sum_slots(K)
    latest = np.minimum.accumulate(((F0 - 1 - behind) // K - i)[::-1])[::-1] + i
    earliest = np.maximum.accumulate(-((ahead - B0 - 1) // K) - i) + i
    embed_sum, embed_grad_broadcast = latest * K + behind, earliest * K + ahead
    return {
        ("run", "IF"): embed_sum - slots + 1,
        ("start", "embed_sum"): embed_sum - slots + 1,
        ("done", "embed_sum"): embed_sum,
        ("start", "embed_grad_broadcast"): embed_grad_broadcast,
        ("done", "embed_grad_broadcast"): embed_grad_broadcast + slots - 1,
        ("run", "IB"): embed_grad_broadcast + slots - 1,
    }
