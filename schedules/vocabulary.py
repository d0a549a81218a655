"""Vocabulary passes by one rule for any building block.

Between the last stage's F and its B the output layer needs time: one interval for each barrier beyond the broadcast.
:func:`insert` delays every B and W by that many intervals, then places the steps of the vocabulary layers. Names:

    IF     local lookup of the input layer            CI   its sum over the shards
    C0     broadcast of the last stage's output X     S    local logits and softmax (S1, S2 where split)
    stats  reduction of row maxima and sums           T    weight gradient (Algorithm 1: also the input gradient)
    big    sum of the input gradient over shards      G    backward of the final norm, on the last stage's device
    CB     broadcast of the first stage's gradient    IB   scatter-add into the local embedding shard
    H      the whole output layer on one device, where it is not sharded
"""

from __future__ import annotations

from .blocks import Block
from .schedule import Step, Vocabulary

BARRIERS = {"baseline": 0, "redis": 0, "interlaced": 0, "vocab-2": 1, "vocab-1": 2, "vocab-naive": 3}
METHODS = tuple(BARRIERS)


def _ends_inside(block: Block, device: int, slot: int) -> bool:
    """Whether a device stands between two passes when ``slot`` ends, rather than in the middle of one."""
    K = block.interval
    return not any((slot - x.start) % K < x.slots - 1 for x in block.passes(device, 0))


def _vocabulary_slots(block: Block, end: int) -> tuple[int, ...]:
    """For each device, the slot after which its S and T stand: not in the middle of a pass, a slot after C0."""
    slots = []
    for d in range(block.p):
        free = [t for t in range(end + 1, end + 1 + block.longest) if _ends_inside(block, d, t)]
        if not free:
            raise ValueError(f"device {d} is inside a pass at the end of every slot {end + 1}..{end + block.longest}; "
                             "leave it a boundary there")
        slots.append(free[-1])
    return tuple(slots)


def insert(block: Block, method: str, period: int | None = None) -> tuple[Block, Vocabulary]:
    """The block with room for a method's vocabulary passes, and when those run.

    ``period`` is the slots between two microbatches' outputs of the last stage, where it is not the block's interval.
    """
    if method not in BARRIERS:
        raise ValueError(f"method is {method!r}; the methods are {', '.join(METHODS)}")
    period = period or block.interval
    barriers = BARRIERS[method]
    block = block.delayed_backward(barriers * block.interval)
    first, last = block.placement[0], block.placement[-1]
    end = block.F[-1]
    p = block.p

    def everywhere(op: str, name: str, slot: int, after: bool = True) -> Step:
        return Step(op, name, (slot,) * p, after)

    def on(device: int, name: str, slot: int, after: bool = True) -> Step:
        return Step("run", name, tuple(slot if d == device else None for d in range(p)), after)

    train = bool(block.B)
    if method in ("baseline", "redis"):
        steps = [on(first, "IF", block.F[0], after=False), on(last, "H", end)]
        if train:
            steps.append(on(first, "IB", block.B[0] + block.backward_slots - 1))
        return block, Vocabulary(method, period, tuple(steps))

    steps = _input_steps(block, everywhere, end, period)
    if method == "interlaced":
        names = [("start", "C0"), ("done", "C0"), ("run", "S"), ("start", "stats"), ("done", "stats")]
        if train:
            names += [("run", "T"), ("start", "big"), ("done", "big")]
        steps += [everywhere(op, name, end) for op, name in names]
        if train:
            steps.append(on(last, "G", end))
        return block, Vocabulary(method, period, tuple(steps))

    at = _vocabulary_slots(block, end)
    w = block.longest

    def passes(name: str, later: int) -> Step:
        return Step("run", name, tuple(t + later * period for t in at))

    steps += [everywhere("start", "C0", end + 1, after=False), everywhere("done", "C0", end + 1)]
    # T of an older microbatch before S of a newer one, so that one result of S is held at a time.
    if method == "vocab-naive":
        older = [passes("T", 2)] if train else []
        steps += older + [passes("S2", 1), passes("S1", 0)]
        steps += [everywhere("start", "max", end + w), everywhere("done", "max", end + w + 1)]
        steps += [everywhere("start", "stats", end + period + w), everywhere("done", "stats", end + period + w + 1)]
    else:
        steps += ([passes("T", 1)] if train else []) + [passes("S", 0)]
        steps += [everywhere("start", "stats", end + w), everywhere("done", "stats", end + w + 1)]
    if not train:
        return block, Vocabulary(method, period, tuple(steps), barriers)
    ready = end + w + 1 if method == "vocab-2" else end + (barriers - 1) * period + w
    # Right behind the stats, or one slot after the last T; it then has until the B that needs it.
    start = ready + 1
    needed = block.B[-1] + block.backward_slots - 1
    done = min(needed, start + max(1, period - 1)) if period != block.interval else needed
    steps += [everywhere("start", "big", start, after=False), everywhere("done", "big", done, after=False),
              on(last, "G", done, after=False)]
    return block, Vocabulary(method, period, tuple(steps), barriers)


def _input_steps(block: Block, everywhere, end: int, period: int) -> list[Step]:
    """IF at least an interval ahead of the first stage's F, IB behind its B; both sums stand inside one interval."""
    K = block.interval
    # Slot end + 1 opens the program's interval (C0 starts there), so place both within [end + 1, end + K].
    phase = end + 1
    latest = block.F[0] - 1
    done = latest - (latest - (phase + min(K - 1, 2))) % K if K > 1 else latest
    start = done - min(K - 1, 1)
    steps = [everywhere("run", "IF", start), everywhere("start", "CI", start), everywhere("done", "CI", done)]
    if K == 1 or period != K:
        pass
    if block.B:
        ready = block.B[0] + block.backward_slots
        begin = ready + (phase + min(K - 1, 1) - ready) % K
        steps += [everywhere("start", "CB", begin, after=False),
                  everywhere("done", "CB", begin + min(K - 1, 1), after=True),
                  everywhere("run", "IB", begin + min(K - 1, 1))]
    return steps
