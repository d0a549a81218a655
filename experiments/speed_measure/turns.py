"""Timing in turns: what slows the machine down for a while then slows all that is compared."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from speed_measure.processes import Group

Left = Callable[[], float]  # seconds that are left


@dataclass
class Times:
    """What a step took, in every round: seconds, and seconds of all ranks' processors together."""

    seconds: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)


def ratio(of: list[float], to: list[float]) -> float:
    """The median over the rounds of the ratio within a round."""
    return median(a / b for a, b in zip(of, to, strict=True))


def countdown(seconds: float) -> Left:
    """What is left of some time, at least one second."""
    end = time.monotonic() + seconds
    return lambda: max(1.0, end - time.monotonic())


def in_turns(
    asked: dict[str, tuple[Any, str]], repeats: int, left: Left, label: str = "", passes_of: Any = None
) -> dict[str, Times]:
    """Times a step of each in rounds, as many as there is time for, behind one round that touches the memory.

    Args:
        asked: by name the group that runs it, and what the group calls it.
        repeats: the most rounds.
        left: the time that they have.
        label: what progress is told of.
        passes_of: the group, if any, that times the passes it has prepared in every round as well.
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
        # Where nothing else watches the ranks, none may decide on its own.
        if number and left() < 1.2 * spent and all(isinstance(group, Group) for group, _ in asked.values()):
            break
    return times


def say(line: str) -> None:
    """Progress, on standard error."""
    print(line, file=sys.stderr, flush=True)
