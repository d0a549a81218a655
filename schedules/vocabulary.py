"""Inserts vocabulary passes into any building block, by a single rule.

Between the last stage's F and its B the output layer needs time: one interval for each barrier beyond the broadcast.
:func:`insert` delays every B and W by that many intervals, then places the steps of the vocabulary layers, whose names
are in :mod:`.instructions`.

An interval of the lowered program opens at the slot in which the broadcast of the last stage's output starts. A
collective starts before a slot's passes and lands after them, or after those of a later slot of the same interval: no
scan step boundary cuts it, and within as many slots as the longest pass takes, every device has a pass to hide it
behind. A block may give the broadcast fewer; some device may then have no pass to hide it. S is in the same slot on all
devices, and so is T. A device that is in the middle of a pass in that slot runs them before it.

Where collectives cannot overlap with passes, as on CPUs, each would make all devices wait for the slowest at a
different place. There, all steps follow the last F, one after the other, with nothing in between.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from .blocks import Block
from .schedule import AFTER, BEFORE, LANDINGS, Op, Step, Vocabulary

BARRIERS = {"baseline": 0, "redis": 0, "interlaced": 0, "vocab-2": 1, "vocab-1": 2, "vocab-naive": 3}
METHODS = tuple(BARRIERS)
SHARDED = tuple(m for m in METHODS if m not in ("baseline", "redis"))


def insert(
    block: Block, method: str, m: int, inserted: int | None = None, overlap: bool = True
) -> tuple[Block, Vocabulary]:
    """The block with room for a method's vocabulary passes, and when those run for ``m`` microbatches.

    ``inserted`` is the number of intervals between the last stage's F and its B, raised if the passes need more; by
    default as published. Each is one more microbatch in flight. Without ``overlap`` there are none.

    Raises:
        ValueError: an unknown method, or intervals for a method without barriers, or without overlap.
    """
    if method not in BARRIERS:
        raise ValueError(f"method is {method!r}; the methods are {', '.join(METHODS)}")
    if inserted is not None and (inserted < 0 or not BARRIERS[method]):
        fit = ", ".join(name for name, barriers in BARRIERS.items() if barriers)
        raise ValueError(
            f"inserted is {inserted} with method {method!r}; 0 intervals or more can be inserted for {fit}"
        )
    if inserted and not overlap:
        raise ValueError(f"inserted is {inserted} without overlap, where passes need no intervals; leave it out")
    shifts, count = tuple(block.shift(i) for i in range(m)), 0
    if method not in SHARDED:
        first_B = [block.B[0] + block.backward_slots - 1 + t for t in shifts] if block.B else []
        steps = unsharded(block.placement, [block.F[0] + t for t in shifts], [block.F[-1] + t for t in shifts], first_B)
    elif method == "interlaced" or not overlap:
        steps = list(_synchronous(block, method))
    else:
        output = _output_steps(block, method)
        if block.B:
            there = (block.B[-1] - block.F[-1] - 1) // block.interval
            count = max(_needed(block, output), BARRIERS[method] - there if inserted is None else inserted)
        block = block.delayed_backward(count * block.interval)
        steps = _latest_grad_sum(block, output) + _input_steps(block)
    return block, Vocabulary(method, tuple(steps), shifts, count)


def _on(block: Block, device: int, name: str, slot: int) -> Step:
    return Step("run", name, tuple(slot if d == device else None for d in range(block.p)))


def _everywhere(block: Block, op: Op, name: str, slot: int, place: int = AFTER) -> Step:
    return Step(op, name, (slot,) * block.p, place)


def _ends(block: Block, name: str, first: int, slots: int) -> tuple[Step, Step]:
    """A collective from before the passes of slot ``first``, over ``slots`` slots or to the end of the interval."""
    last = min(first + slots - 1, _closes(block, first))
    return _everywhere(block, "start", name, first, BEFORE), _everywhere(block, "done", name, last, LANDINGS)


def _closes(block: Block, slot: int) -> int:
    """The last slot of the program's interval that contains a slot."""
    return slot + block.interval - 1 - (slot - (block.F[-1] + 1)) % block.interval


# --- the output layer ------------------------------------------------------------------------------------------------


def _output_steps(block: Block, method: str) -> list[Step]:
    """The broadcast, S, T and their reductions, as soon as inputs allow; in this order if they share a place."""
    K, end, w = block.interval, block.F[-1], block.longest
    over = block.broadcast_slots or w
    after_S = end + over + 1  # S runs before this slot's passes; the reduction of its row sums starts in it
    after_T = after_S + block.stats_slots

    def run(name: str, slot: int) -> Step:
        return _everywhere(block, "run", name, slot, BEFORE)

    broadcast, broadcast_done = _ends(block, "hidden_broadcast", end + 1, over)
    if method == "vocab-naive":
        highest, highest_done = _ends(block, "max", after_S, 1)
        stats, stats_done = _ends(block, "stats", after_T, w)
        softmax, dones = (
            [run("S2", after_T), stats, run("S1", after_S), highest],
            [broadcast_done, highest_done, stats_done],
        )
        after_T += K
    else:
        stats, stats_done = _ends(block, "stats", after_S, block.stats_slots)
        softmax, dones = [run("S", after_S), stats], [broadcast_done, stats_done]
    if not block.B:
        return [broadcast, *softmax, *dones]
    # T of an older microbatch before S of a newer one, so that only one result of S is held at a time. Algorithm 2 sums
    # what S produced, so that T hides the sum; Algorithm 1 sums what T produces.
    total, total_done = _ends(block, "grad_sum", after_T, 1 if method == "vocab-2" else w)
    T = run("T", after_T)
    first = [total, broadcast, T] if method == "vocab-2" else [broadcast, T, total]
    return [*first, *softmax, *dones, total_done, _on(block, block.placement[-1], "G", total_done.at[0])]


def _needed(block: Block, output: list[Step]) -> int:
    """The intervals without which the last stage's B would precede its input gradient."""
    done = next(s.at[0] for s in output if (s.op, s.name) == ("done", "grad_sum"))
    last_of_B = block.B[-1] + block.backward_slots - 1
    return max(0, -(-(done + 1 - last_of_B) // block.interval))


def _latest_grad_sum(block: Block, output: list[Step]) -> list[Step]:
    """The sum of the input gradient, finished as late as its interval and the B that needs it allow."""
    if not block.B:
        return output
    start = next(s.at[0] for s in output if (s.op, s.name) == ("start", "grad_sum"))
    done = min(_closes(block, start), block.B[-1] + block.backward_slots - 2)
    return [
        s
        if (s.op, s.name) not in (("done", "grad_sum"), ("run", "G"))
        else replace(s, at=tuple(None if t is None else done for t in s.at))
        for s in output
    ]


# --- the input layer, and the methods without overlap ----------------------------------------------------------------


def _input_steps(block: Block) -> list[Step]:
    """IF before the first stage's F, IB after its B, each with a sum of up to three slots within one interval."""
    opens = block.F[-1] + 1
    slots = min(block.interval, 3 * block.pass_slots)
    start = block.F[0] - 1 - input_delay(block.interval, block.F[0] - 1 - opens, -1, slots)
    steps = [
        _everywhere(block, "run", "IF", start - slots + 1, BEFORE),
        *_ends(block, "embed_sum", start - slots + 1, slots),
    ]
    if block.B:
        ready = block.B[0] + block.backward_slots
        start = ready + input_delay(block.interval, ready - opens, 1, slots)
        broadcast, done = _ends(block, "embed_grad_broadcast", start, slots)
        steps += [broadcast, done, _everywhere(block, "run", "IB", done.at[0])]
    return steps


def sum_slots(interval: int) -> int:
    """Slots that the collectives of the input layer may take."""
    return min(interval, 3)


def input_delay(interval: int, slot: int, way: int, slots: int | None = None) -> int:
    """How many slots to wait from ``slot``, backward or forward, for a window that no interval boundary cuts.

    ``slot``, counted from an interval's opening, would be its last if ``way`` is -1, its first if 1. The slot that
    opens the interval is avoided if that costs at most two slots.
    """
    slots = sum_slots(interval) if slots is None else slots

    def first_of(wait: int) -> int:
        return (slot - slots + 1 - wait if way < 0 else slot + wait) % interval

    whole = [wait for wait in range(interval) if first_of(wait) + slots <= interval]
    return next((wait for wait in whole if first_of(wait) > 0 and wait <= whole[0] + 2), whole[0])


def unsharded(
    placement: Sequence[int], first_F: Sequence[int], last_F: Sequence[int], first_B: Sequence[int] = ()
) -> tuple[Step, ...]:
    """IF, H and IB on the devices of the first and last stage, with those stages' passes.

    Takes, for every microbatch, the slots in which the first stage's F, the last stage's F and the first stage's B end.
    """

    def step(name: str, stage: int, slots: Sequence[int], place: int) -> Step:
        at = tuple(int(slots[0]) if d == placement[stage] else None for d in range(max(placement) + 1))
        return Step("run", name, at, place, tuple(int(t) - int(slots[0]) for t in slots))

    steps = (step("IF", 0, first_F, BEFORE), step("H", -1, last_F, AFTER))
    return (*steps, step("IB", 0, first_B, AFTER)) if len(first_B) else steps


_SOFTMAX = ("run S", "start stats", "done stats")
_SUM = ("start grad_sum", "done grad_sum")
_ALGORITHM_1 = (*_SOFTMAX, "run T", *_SUM)
_IN_A_ROW = {
    "interlaced": _ALGORITHM_1,
    "vocab-1": _ALGORITHM_1,
    "vocab-2": (*_SOFTMAX, *_SUM, "run T"),
    "vocab-naive": ("run S1", "start max", "done max", "run S2", "start stats", "done stats", "run T", *_SUM),
}


def _synchronous(block: Block, method: str) -> Iterator[Step]:
    """All steps after the last F, with every device waiting for each collective: interlaced (Lin et al. 2024)."""
    K, end = block.interval, block.F[-1]
    before = block.F[0] - 1 - (block.F[0] - 1 - end) % K
    yield from _stand(block, before, ("run IF", "start embed_sum", "done embed_sum"))
    if block.B:
        # Before S: where one collective makes devices wait for each other, the next adds no wait.
        ready = block.B[0] + block.backward_slots - 1
        yield from _stand(
            block, ready + (end - ready) % K, ("start embed_grad_broadcast", "done embed_grad_broadcast", "run IB")
        )
    yield from _stand(
        block, end, ("start hidden_broadcast", "done hidden_broadcast", *(_IN_A_ROW[method] if block.B else _SOFTMAX))
    )
    if block.B:
        yield _on(block, block.placement[-1], "G", end)


def _stand(block: Block, slot: int, steps: Iterable[str]) -> Iterator[Step]:
    """Steps one after the other, after a slot's passes."""
    for step in steps:
        op, name = step.split()
        yield _everywhere(block, op, name, slot)
