"""Building blocks: the passes of microbatch 0, which every later microbatch repeats one interval later.

A block is all that a schedule's author has to write. Starts are in slots; see :mod:`vocabpp_jax.schedules.schedule`.
Slots need not take equal time: a slot in which a device has nothing to do takes none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .schedule import Pass


@dataclass(frozen=True)
class Block:
    """Start slots of microbatch 0's passes, by stage, and the interval after which microbatch 1 repeats them.

    Attributes:
        interval: slots between one microbatch and the next.
        placement: the device of every stage.
        F, B: start slot of each stage's forward and backward.
        W: start slot of each stage's weight gradient, or () if B computes it too.
        backward_slots: slots that a B takes; a forward takes 1, and a B that computes both gradients usually 2.
        group, group_interval: for microbatches that come in groups, the group size and the slots between groups.
        pass_slots: slots in which every device reaches the end of a pass, if slots are finer than passes.
        stats_slots: slots in which the softmax statistics are exchanged.
        broadcast_slots: slots for the broadcast of the last stage's output; 0 for as many as the longest pass takes.
    """

    interval: int
    placement: tuple[int, ...]
    F: tuple[int, ...]
    B: tuple[int, ...] = ()
    W: tuple[int, ...] = ()
    backward_slots: int = 1
    group: int = 1
    group_interval: int = 0
    pass_slots: int = 1
    stats_slots: int = 1
    broadcast_slots: int = 0

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"interval is {self.interval}; a block repeats after 1 slot or more")
        for name in ("F", "B", "W"):
            starts = getattr(self, name)
            if len(starts) != len(self.placement) and (starts or name == "F"):
                raise ValueError(
                    f"{name} has {len(starts)} starts; give one for each of the {len(self.placement)} stages"
                )
        if self.group < 1 or self.group_interval % self.interval:
            raise ValueError(
                f"group is {self.group} and group_interval {self.group_interval}; a group has 1 microbatch or "
                f"more, and the next follows after a multiple of the interval, {self.interval} slots"
            )
        if self.W and not self.B:
            raise ValueError("W has starts and B has none; weight gradients need the backward that they follow")

    @property
    def p(self) -> int:
        """Number of devices."""
        return max(self.placement) + 1

    @property
    def longest(self) -> int:
        """Slots of the longest pass."""
        return max(self.pass_slots, self.backward_slots if self.B else 1)

    def shift(self, i: int) -> int:
        """Slots from microbatch 0's passes to those of microbatch ``i``."""
        groups, rest = divmod(i, self.group)
        return groups * (self.group_interval or self.group * self.interval) + rest * self.interval

    def delayed_backward(self, slots: int) -> Block:
        """The same block with every B and W ``slots`` later."""
        return replace(self, B=tuple(b + slots for b in self.B), W=tuple(w + slots for w in self.W))

    def passes(self, device: int, i: int) -> list[Pass]:
        """The passes of microbatch ``i`` on one device."""
        shift = self.shift(i)
        return [
            Pass(kind, stage, i, starts[stage] + shift, slots)
            for kind, starts, slots in (("F", self.F, 1), ("B", self.B, self.backward_slots), ("W", self.W, 1))
            if starts
            for stage, on in enumerate(self.placement)
            if on == device
        ]


def gpipe(p: int, m: int) -> Block:
    """GPipe (Huang et al. 2019): all m forwards, then all m backwards; m microbatches in flight.

    No interval holds both an F and a B, so one slot serves for either, and the two phases become two scans.
    """
    turn = 2 * (p - 1) + m
    return Block(1, tuple(range(p)), F=tuple(range(p)), B=tuple(turn - d for d in range(p)))


def one_f_one_b(p: int) -> Block:
    """1F1B (Narayanan et al. 2019): one forward, one backward of two slots; p - d microbatches in flight."""
    return Block(
        3, tuple(range(p)), F=tuple(range(p)), B=tuple(p + 2 * (p - 1 - d) for d in range(p)), backward_slots=2
    )


def lockstep_1f1b(p: int) -> Block:
    """1F1B with all devices in the same kind of pass at once, so that no device waits when all wait for each other.

    An output moves on one whole interval later: 2(p - d) - 1 microbatches in flight.
    """
    return interleaved_one_f_one_b(p, 1)


def interlaced(p: int) -> Block:
    """1F1B for synchronous vocabulary passes (Lin et al. 2024): every device is between passes when the last F ends.

    This costs an idle slot on every second hop, and floor(3p/2) microbatches in flight on the first device.
    """
    end = 3 * ((p - 1) // 2) + 2 * ((p - 1) % 2)
    hops = [p - 1 - d for d in range(p)]
    return Block(
        3,
        tuple(range(p)),
        F=tuple(end - 3 * (j // 2) - 2 * (j % 2) for j in hops),
        B=tuple(end + 1 + 3 * j + j % 2 for j in hops),
        backward_slots=2,
    )


def interleaved_one_f_one_b(p: int, chunks: int) -> Block:
    """Interleaved 1F1B (Narayanan et al. 2021): device d holds stages d, p + d, 2p + d, ...; any p and m.

    Microbatches go through one chunk after the other in groups of p, one forward and one backward per round of three
    slots; an incomplete last group leaves its rounds empty. All devices run forwards in the same slot, so an output
    moves on one round later: (chunks + 1) p - 1 stages in flight on the first device, as published.
    """
    turn = 3 * (p * chunks - 1) + 1
    stages = range(p * chunks)
    return Block(
        3,
        tuple(range(p)) * chunks,
        F=tuple(3 * s for s in stages),
        B=tuple(turn + 3 * s for s in stages)[::-1],
        backward_slots=2,
        group=p,
        group_interval=3 * p * chunks,
    )


def zb_h1(p: int) -> Block:
    """ZB-H1 (Qi et al. 2023): 1F1B with separate B and W, with W delayed until every device holds p microbatches."""
    B = tuple(p + 2 * (p - 1 - d) for d in range(p))
    return Block(3, tuple(range(p)), F=tuple(range(p)), B=B, W=tuple(b + 1 + 3 * d for d, b in enumerate(B)))


def zb_h2(p: int) -> Block:
    """ZB-H2 (Qi et al. 2023): 2(p - d) - 1 forwards before the first B; every device holds 2p - 1 microbatches."""
    B = tuple(3 * (2 * p - 2 - d) + 1 for d in range(p))
    return Block(
        3, tuple(range(p)), F=tuple(3 * d for d in range(p)), B=B, W=tuple(b + 1 + 6 * d for d, b in enumerate(B))
    )


def v_min(p: int) -> Block:
    """V-Min (Qi et al. 2024): device d holds stages d and 2p - 1 - d; about 2p/3 half-stages in flight."""
    c = 2 if p % 3 == 0 else 0
    return _v_shape(p, lambda i: i, lambda i: 2 * p - 1 - i, lambda i: 2 * p + c + i, lambda i: 4 * p + c - 1 - i)


def v_half(p: int) -> Block:
    """V-Half (Qi et al. 2024): device d holds stages d and 2p - 1 - d; about p + 2 half-stages in flight."""
    c = 3 if p % 2 == 0 else 0
    return _v_shape(
        p, lambda i: 2 * i, lambda i: 3 * p - 2 - i, lambda i: 3 * p - 1 + c + 2 * i, lambda i: 6 * p - 2 + c - i
    )


def v_zb(p: int) -> Block:
    """V-ZB (Qi et al. 2024): device d holds stages d and 2p - 1 - d; 2p half-stages in flight, no steady bubble."""
    return _v_shape(
        p, lambda i: 4 * i, lambda i: 6 * p - 5 - 2 * i, lambda i: 6 * p - 4 + 4 * i, lambda i: 12 * p - 9 - 2 * i
    )


def _v_shape(p: int, F0, F1, B1, B0) -> Block:
    """Starts of a V-shape's passes as functions of the device, with F=B=W=1 slot."""
    down, up = range(p), range(p - 1, -1, -1)
    F = tuple(F0(d) for d in down) + tuple(F1(d) for d in up)
    B = tuple(B0(d) for d in down) + tuple(B1(d) for d in up)
    placement = (*down, *up)
    return Block(6, placement, F, B, _first_free(6, placement, F, B))


def _first_free(K: int, placement: Sequence[int], F: Sequence[int], B: Sequence[int]) -> tuple[int, ...]:
    """Start of each W: the first slot after its B that is free on its device in every interval, oldest B first."""
    taken = [
        {x % K for starts in (F, B) for x, on in zip(starts, placement, strict=True) if on == d}
        for d in range(max(placement) + 1)
    ]
    W = [0] * len(B)
    for b, stage in sorted((b, stage) for stage, b in enumerate(B)):
        busy = taken[placement[stage]]
        W[stage] = next(t for t in range(b + 1, b + 1 + K) if t % K not in busy)
        busy.add(W[stage] % K)
    return tuple(W)


def forward_only(placement: Sequence[int]) -> Block:
    """Evaluation: one forward of every stage per interval; nothing is kept."""
    chunks = len(placement) // (max(placement) + 1)
    taken: dict[int, set[int]] = {}
    F: list[int] = []
    for device in placement:
        busy = taken.setdefault(device, set())
        earliest = F[-1] + 1 if F else 0
        F.append(next(t for t in range(earliest, earliest + chunks) if t % chunks not in busy))
        busy.add(F[-1] % chunks)
    return Block(chunks, tuple(placement), tuple(F))
