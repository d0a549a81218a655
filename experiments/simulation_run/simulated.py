"""A simulated iteration, and the table of several."""

from __future__ import annotations

from dataclasses import dataclass

from vocabpp_jax.schedules.simulation.cost import Cost
from vocabpp_jax.schedules.simulation.timeline import Timeline


@dataclass(frozen=True)
class Result:
    """A simulated iteration, in milliseconds, with derived metrics."""

    timeline: Timeline
    cost: Cost
    of_model: bool = True
    """Whether the durations come from the model; otherwise there is no MFU."""

    @property
    def ms(self) -> float:
        """Time of the iteration."""
        return self.timeline.makespan

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization, 0 to 1."""
        schedule = self.timeline.schedule
        return self.cost.mfu(schedule.m, schedule.p, self.ms / 1e3)

    @property
    def peak_bytes(self) -> tuple[float, ...]:
        """Estimated bytes on each device."""
        return self.cost.peak_bytes(self.timeline)

    def json(self) -> dict:
        """The numbers for ``--json``."""
        schedule, timeline = self.timeline.schedule, self.timeline
        return {
            "schedule": schedule.name,
            "method": schedule.method,
            "stages": schedule.p,
            "microbatches": schedule.m,
            "gpu": self.cost.gpu.name,
            "iteration_ms": self.ms,
            "bubble_ratio": timeline.bubble_ratio,
            "steady_bubble_ratio": timeline.steady_bubble,
            "longest_wait_ratio": timeline.longest_wait_ratio,
            "mfu": self.mfu if self.of_model else None,
            "busy_ms": timeline.busy.tolist(),
            "peak_in_flight": list(timeline.peak_in_flight),
            "peak_bytes": list(self.peak_bytes),
        }


def print_table(results: list[Result]) -> None:
    """Print one line per result."""
    head = ("schedule", "method", "ms", "bubble", "MFU", "in flight", "GiB most", "least")
    print("{:<18}{:<13}{:>9}{:>8}{:>8}{:>11}{:>10}{:>7}".format(*head))
    for r in results:
        schedule, peaks = r.timeline.schedule, r.peak_bytes
        # A chunk is part of what a device holds: count in flight in units of all chunks of one microbatch.
        held = max(r.timeline.peak_in_flight) / schedule.chunks
        full = "  more than the GPU has" if max(peaks) > r.cost.gpu.memory_bytes else ""
        mfu = f"{r.mfu:.1%}" if r.of_model else "-"
        print(
            f"{schedule.name:<18}{schedule.method:<13}{r.ms:>9.1f}{r.timeline.bubble_ratio:>8.1%}{mfu:>8}"
            f"{held:>11.4g}{max(peaks) / 2**30:>10.1f}{min(peaks) / 2**30:>7.1f}{full}"
        )
