"""The planner's results: plans, and what does not fit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .footprint import Bytes
from .request import Choice, Request


@dataclass(frozen=True)
class Plan:
    """A choice that fits, with its expected performance.

    Attributes:
        step_seconds: passes, collectives, and the optimizer.
        bubble, communication: fractions of that in which a device waits for other devices' passes, and in which only
            communication is in progress: sums over ``tensor`` and ``data``.
        estimated: bytes per device.
        compiled_bytes: the compiler's peak, or None if nothing was compiled.
        measured_seconds: of passes and collectives on this machine, or None if they were not timed.
    """

    request: Request = field(repr=False)
    choice: Choice
    step_seconds: float
    bubble: float
    communication: float
    estimated: Bytes
    compiled_bytes: int | None = None
    measured_seconds: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """Summed over all devices."""
        return self.request.global_batch * self.request.sizes.seq / self.step_seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization, 0 to 1."""
        flops = self.request.sizes.iteration_flops(self.request.global_batch)
        return flops / (self.step_seconds * self.request.gpus * self.request.gpu.peak_flops)

    def json(self) -> dict[str, Any]:
        """Numbers and names; ``compiled_bytes`` and ``measured_seconds`` only where there are such."""
        found = {"compiled_bytes": self.compiled_bytes, "measured_seconds": self.measured_seconds}
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
            | {name: value for name, value in found.items() if value is not None}
        )


@dataclass(frozen=True)
class Dropped:
    """A choice that does not fit, a lower bound on its step time, and its estimated bytes."""

    choice: Choice
    at_least: float
    bytes: float


@dataclass(frozen=True)
class Ranked:
    """Plans, best first; faster-looking choices that do not fit; and the total number of choices."""

    plans: tuple[Plan, ...]
    dropped: tuple[Dropped, ...]
    choices: int
    simulated: int
