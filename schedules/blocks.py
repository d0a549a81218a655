"""Building blocks: the passes of microbatch 0, which every later microbatch repeats one interval later.

A block is all that a schedule's author has to write. Starts are in slots; see :mod:`vocabpp_jax.schedules.schedule`.
"""

from __future__ import annotations

from dataclasses import dataclass

from .schedule import Pass


@dataclass(frozen=True)
class Block:
    """Start slots of microbatch 0's passes, by stage, and the interval after which microbatch 1 repeats them.

    Attributes:
        interval: slots between one microbatch and the next.
        placement: the device of every stage.
        F, B: start slot of each stage's forward and backward.
        W: start slot of each stage's weight gradient, or () where B computes it too.
        backward_slots: slots that a B takes; a forward takes 1, and a B that computes both gradients usually 2.
    """

    interval: int
    placement: tuple[int, ...]
    F: tuple[int, ...]
    B: tuple[int, ...] = ()
    W: tuple[int, ...] = ()
    backward_slots: int = 1

    @property
    def p(self) -> int:
        """Devices."""
        return max(self.placement) + 1

    @property
    def longest(self) -> int:
        """Slots of the longest pass."""
        return self.backward_slots if self.B else 1

    def delayed_backward(self, slots: int) -> Block:
        """The same block with every B and W ``slots`` later."""
        return Block(self.interval, self.placement, self.F, tuple(b + slots for b in self.B),
                     tuple(w + slots for w in self.W), self.backward_slots)

    def passes(self, device: int, i: int) -> list[Pass]:
        """The passes of microbatch ``i`` on one device."""
        shift = i * self.interval
        return [Pass(kind, stage, i, starts[stage] + shift, slots)
                for kind, starts, slots in (("F", self.F, 1), ("B", self.B, self.backward_slots), ("W", self.W, 1))
                if starts
                for stage, on in enumerate(self.placement) if on == device]


def one_f_one_b(p: int) -> Block:
    """1F1B (Narayanan et al. 2019): one forward, one backward of two slots; p - d microbatches in flight."""
    return Block(3, tuple(range(p)), F=tuple(range(p)), B=tuple(p + 2 * (p - 1 - d) for d in range(p)),
                 backward_slots=2)


def forward_only(p: int) -> Block:
    """Evaluation: one forward an interval, nothing kept."""
    return Block(1, tuple(range(p)), F=tuple(range(p)))
