"""Timing in turns: a temporary slowdown of the machine then affects everything that is compared."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from speed_measure.processes import Group

Left = Callable[[], float]  # seconds left


@dataclass
class Times:
    """A step's time in every round: seconds, and processor seconds summed over ranks."""

    seconds: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)


def ratio(of: list[float], to: list[float]) -> float:
    """The median over the rounds of the ratio within a round."""
    return median(a / b for a, b in zip(of, to, strict=True))


def countdown(seconds: float) -> Left:
    """The remaining seconds of a time limit, at least one."""
    end = time.monotonic() + seconds
    return lambda: max(1.0, end - time.monotonic())


def in_turns(
    asked: dict[str, tuple[Any, str]], repeats: int, left: Left, label: str = "", passes_of: Any = None
) -> dict[str, Times]:
    """Time a step of each in rounds, as many as time allows, after one untimed round that touches the memory.

    Args:
        asked: by name, the group that runs it, and its name within the group.
        repeats: maximum number of rounds.
        left: the remaining time.
        label: label for progress messages.
        passes_of: a group whose prepared passes are also timed in every round, if any.
    """
    times = {name: Times() for name in asked}
    for number in range(repeats + 1):
        began = time.monotonic()
        for name, (group, there) in asked.items():
            took = group.ask("time", left(), name=there)
            if number:
                times[name].seconds.append(max(seconds for seconds, _ in took))
                times[name].cpu_s.append(sum(cpu for _, cpu in took))
        if number and passes_of:
            passes_of.ask("time_passes", left())
        spent = time.monotonic() - began
        say(f"{label}round {number} of {repeats}, {spent:.1f} s, {left():.0f} s left")
        # If nothing else watches the ranks, none may decide to stop by itself.
        if number and left() < 1.2 * spent and all(isinstance(group, Group) for group, _ in asked.values()):
            break
    return times


def say(line: str) -> None:
    """Print progress to standard error."""
    print(line, file=sys.stderr, flush=True)
