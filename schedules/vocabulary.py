"""Vocabulary passes by one rule for any building block.

Between the last stage's F and its B the output layer needs time: one interval for each barrier beyond the broadcast.
:func:`insert` delays every B and W by that many intervals, then places the steps of the vocabulary layers. Names:

    IF     local lookup of the input layer            CI   its sum over the shards
    C0     broadcast of the last stage's output X     S    local logits and softmax (S1, S2 where split)
    stats  reduction of row maxima and sums           T    weight gradient (Algorithm 1: also the input gradient)
    big    sum of the input gradient over shards      G    backward of the final norm, on the last stage's device
    CB     broadcast of the first stage's gradient    IB   scatter-add into the local embedding shard
    H      the whole output layer on one device, where it is not sharded

An interval of the lowered program opens at the slot in which C0 runs. A collective starts before a slot's passes and is
done behind them or behind those of a later slot of the same interval, so that passes hide it and no scan step cuts it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .blocks import Block
from .schedule import Op, Step, Vocabulary

BARRIERS = {"baseline": 0, "redis": 0, "interlaced": 0, "vocab-2": 1, "vocab-1": 2, "vocab-naive": 3}
METHODS = tuple(BARRIERS)
SHARDED = tuple(m for m in METHODS if m not in ("baseline", "redis"))


def insert(block: Block, method: str, m: int) -> tuple[Block, Vocabulary]:
    """The block with room for a method's vocabulary passes, and when those run for ``m`` microbatches.

    Raises:
        ValueError: an unknown method, or a block whose devices are never between two passes where S and T must stand.
    """
    if method not in BARRIERS:
        raise ValueError(f"method is {method!r}; the methods are {', '.join(METHODS)}")
    shifts, inserted = tuple(block.shift(i) for i in range(m)), 0
    if method not in SHARDED:
        steps = list(_unsharded(block))
    elif method == "interlaced":
        steps = list(_synchronous(block))
    else:
        output = _output_steps(block, method)
        inserted = _inserted(block, output, BARRIERS[method]) if block.B else 0
        block = block.delayed_backward(inserted * block.interval)
        output = _latest_big(block, output)
        steps = _input_steps(block, output) + output
    return block, Vocabulary(method, tuple(steps), shifts, inserted)


def _on(block: Block, device: int, name: str, slot: int, after: bool = True) -> Step:
    return Step("run", name, tuple(slot if d == device else None for d in range(block.p)), after)


def _everywhere(block: Block, op: Op, name: str, slot: int, after: bool = True) -> Step:
    return Step(op, name, (slot,) * block.p, after)


def _ends(block: Block, name: str, first: int, last: int) -> tuple[Step, Step]:
    """A collective from before the passes of slot ``first`` to behind those of slot ``last``."""
    return _everywhere(block, "start", name, first, after=False), _everywhere(block, "done", name, last)


# --- the output layer ------------------------------------------------------------------------------------------------


def _output_steps(block: Block, method: str) -> list[Step]:
    """C0, S, T and their reductions, each as soon as its inputs allow, at one place of the interval for S and T."""
    K, end, w = block.interval, block.F[-1], block.longest
    at = [t + 1 for t in _between_passes(block, range(end + 1, end + 1 + w))]
    closed = end + w + 1  # the slot before whose passes every device has run S

    def passes(name: str, intervals: int) -> Step:
        return Step("run", name, tuple(t + intervals * K for t in at), after=False)

    C0_start, C0_done = _ends(block, "C0", end + 1, end + 1)
    if method == "vocab-naive":
        runs, first_T = [passes("S2", 1), passes("S1", 0)], 2
        reductions = [*_ends(block, "max", closed, closed), *_ends(block, "stats", closed + K, closed + K)]
    else:
        runs, first_T = [passes("S", 0)], 1
        reductions = [*_ends(block, "stats", closed, closed)]
    if not block.B:
        return [C0_start, *runs, *reductions, C0_done]
    # T of an older microbatch before S of a newer one, so that one result of S is held at a time.
    runs = [passes("T", first_T), *runs]
    if method == "vocab-2":  # sums what S made, and begins before S or T of the next interval
        big, done = _ends(block, "big", closed + 1, closed + 1)
        begin, behind = [C0_start, big], []
    else:  # sums what T makes
        big, done = _ends(block, "big", closed + first_T * K, closed + first_T * K)
        begin, behind = [C0_start], [big]
    return [*begin, *runs, *reductions, *behind, C0_done, done, _on(block, block.placement[-1], "G", done.at[0])]


def _between_passes(block: Block, slots: Iterable[int]) -> tuple[int, ...]:
    """For each device the last of the slots behind which it is between two passes, not in the middle of one."""
    slots, found = list(slots), []
    for d in range(block.p):
        inside = {x.start + k for x in block.passes(d, 0) for k in range(x.slots - 1)}
        free = [t for t in slots if all((t - other) % block.interval for other in inside)]
        if not free:
            raise ValueError(f"device {d} is inside a pass at the end of every slot {slots[0]} to {slots[-1]}; "
                             "leave it a boundary there, where S and T stand")
        found.append(free[-1])
    return tuple(found)


def _inserted(block: Block, output: list[Step], barriers: int) -> int:
    """Intervals to insert between the last F and the last stage's B: one a barrier, less what stands there already."""
    done = next(s.at[0] for s in output if (s.op, s.name) == ("done", "big"))
    last_of_B = block.B[-1] + block.backward_slots - 1
    needed = -(-(done + 1 - last_of_B) // block.interval)
    there = (block.B[-1] - block.F[-1] - 1) // block.interval
    return max(0, needed, barriers - there)


def _latest_big(block: Block, output: list[Step]) -> list[Step]:
    """The sum of the input gradient, finished as late as its interval and the B that needs it allow."""
    if not block.B:
        return output
    opens = block.F[-1] + 1
    start = next(s.at[0] for s in output if (s.op, s.name) == ("start", "big"))
    closes = start + block.interval - 1 - (start - opens) % block.interval
    done = min(closes, block.B[-1] + block.backward_slots - 2)
    return [s if (s.op, s.name) not in (("done", "big"), ("run", "G"))
            else Step(s.op, s.name, tuple(None if t is None else done for t in s.at), s.after) for s in output]


# --- the input layer, and the methods without overlap ----------------------------------------------------------------


def _input_steps(block: Block, output: list[Step]) -> list[Step]:
    """IF shortly before the first stage's F, IB shortly after its B, in slots where no other large collective runs."""
    K = block.interval
    taken = {t % K for s in output if s.name in ("C0", "big") for t in s.at[:1]}

    def quiet(slots: Iterable[int]) -> int:
        slots = list(slots)
        return next((t for t in slots if t % K not in taken), slots[0])

    D = quiet(range(block.F[0] - 1, block.F[0] - 4, -1))
    steps = [_everywhere(block, "run", "IF", D, after=False), *_ends(block, "CI", D, D)]
    if block.B:
        taken.add(D % K)
        ready = block.B[0] + block.backward_slots
        D = quiet(range(ready, ready + 3))
        steps += [*_ends(block, "CB", D, D), _everywhere(block, "run", "IB", D)]
    return steps


def _unsharded(block: Block) -> Iterator[Step]:
    """Embedding and head on the first and the last stage's devices, as part of those stages' passes."""
    first, last = block.placement[0], block.placement[-1]
    yield _on(block, first, "IF", block.F[0], after=False)
    yield _on(block, last, "H", block.F[-1])
    if block.B:
        yield _on(block, first, "IB", block.B[0] + block.backward_slots - 1)


def _synchronous(block: Block) -> Iterator[Step]:
    """Interlaced (Lin et al. 2024): all steps behind the last F, with every device waiting for each collective."""
    K, end = block.interval, block.F[-1]
    _between_passes(block, [end])
    before = block.F[0] - 1 - (block.F[0] - 1 - end) % K
    yield from _stand(block, before, ("run IF", "start CI", "done CI"))
    yield from _stand(block, end, ("start C0", "done C0", "run S", "start stats", "done stats"))
    if block.B:
        yield from _stand(block, end, ("run T", "start big", "done big"))
        yield _on(block, block.placement[-1], "G", end)
        ready = block.B[0] + block.backward_slots - 1
        yield from _stand(block, ready + (end - ready) % K, ("start CB", "done CB", "run IB"))


def _stand(block: Block, slot: int, steps: Iterable[str]) -> Iterator[Step]:
    """Steps one after the other behind a slot's passes."""
    for step in steps:
        op, name = step.split()
        yield _everywhere(block, op, name, slot)
