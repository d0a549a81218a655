"""What the planner finds: plans, and what does not fit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .footprint import Bytes
from .request import Choice, Request


@dataclass(frozen=True)
class Plan:
    """A choice that fits, and what is expected of it.

    Attributes:
        step_seconds: passes, collectives, and the optimizer.
        bubble, communication: shares of that in which a device waits for others' passes, and in which nothing but
            communication is under way: sums over ``tensor`` and ``data``.
        estimated: bytes of a device.
        compiled_bytes: the compiler's peak, or None where nothing was compiled.
    """

    request: Request = field(repr=False)
    choice: Choice
    step_seconds: float
    bubble: float
    communication: float
    estimated: Bytes
    compiled_bytes: int | None = None

    @property
    def tokens_per_second(self) -> float:
        """All devices together."""
        return self.request.global_batch * self.request.sizes.seq / self.step_seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, 0 to 1."""
        flops = self.request.sizes.iteration_flops(self.request.global_batch)
        return flops / (self.step_seconds * self.request.gpus * self.request.gpu.peak_flops)

    def json(self) -> dict[str, Any]:
        """Numbers and names; ``compiled_bytes`` only where there are any."""
        compiled = {} if self.compiled_bytes is None else {"compiled_bytes": self.compiled_bytes}
        return (
            {name: getattr(self.choice, name) for name in self.choice.__dataclass_fields__}
            | {
                "microbatches": self.request.microbatches(self.choice),
                "step_seconds": self.step_seconds,
                "tokens_per_second": self.tokens_per_second,
                "mfu": self.mfu,
                "bubble": self.bubble,
                "communication": self.communication,
                "estimated_bytes": round(self.estimated.peak),
            }
            | compiled
        )


@dataclass(frozen=True)
class Dropped:
    """A choice that would not fit, the least time that it would take, and the bytes that it is estimated to need."""

    choice: Choice
    at_least: float
    bytes: float


@dataclass(frozen=True)
class Ranked:
    """Plans, best first; what looked better than the last of them and does not fit; how many choices there were."""

    plans: tuple[Plan, ...]
    dropped: tuple[Dropped, ...]
    choices: int
    simulated: int
