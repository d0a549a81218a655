"""How long devices wait, beside the orders of the published zero-bubble generators."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from typing import Any

from paper.page import Files, Say
from paper.settings import PUBLISHED
from reports.markdown import table
from vocabpp_jax.schedules import Durations, build, lower, simulate
from vocabpp_jax.schedules.simulation.simulator import FREE, GPU, Rules


def peers() -> list[dict[str, str]]:
    """The published generators' orders: durations, and the longest wait in percent."""
    with (PUBLISHED / "peer_schedules.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def longest_wait(peer: Mapping[str, str], rules: Rules) -> float:
    """The longest wait of a device between its first and its last pass in our program, in percent of that time."""
    durations = Durations(**{name: float(peer[name]) for name in ("F", "B", "W", "transfer")})
    p, m = int(peer["stages"]), int(peer["microbatches"])
    program = lower(build(peer["schedule"], "baseline", p=p, m=m, durations=durations, rules=rules))
    return 100 * simulate(program, durations, rules).longest_wait_ratio


def waits(say: Say = lambda _: None) -> list[dict[str, Any]]:
    """Every row of the published generators, and ours."""
    lines, found = [], peers()
    for n, peer in enumerate(found, start=1):
        lines.append(
            {name: peer[name] for name in ("schedule", "stages", "F", "B", "W", "transfer")}
            | {"our program": longest_wait(peer, GPU), "a process per device": longest_wait(peer, FREE)}
            | {"published generators": float(peer["wait_percent"])}
        )
        if n % 9 == 0 or n == len(found):
            say(f"fitted {n}/{len(found)} schedules")
    return lines


def within(lines: Sequence[Mapping[str, Any]], name: str, points: float) -> int:
    """Rows in which ours waits at most so many points longer."""
    return sum(line[name] <= line["published generators"] + points for line in lines)


def section(files: Files, say: Say) -> str:
    """The page's section on waits."""
    lines = waits(say)
    link = files.csv("waits", lines)
    return "\n\n".join(
        [
            "**Simulated**, without vocabulary layers: the longest wait of any device between its first pass and its "
            "last, in percent of that time, with 64 microbatches and schedules fitted to these durations. *Our "
            "program* follows the rules of GPUs, *a process per device* the rules `free`; the published zero-bubble "
            "generators are timed with a process per device and hold as many microbatches in flight. Our program waits "
            f"at most one point longer in {within(lines, 'our program', 1)} of {len(lines)} rows, and a process per "
            f"device at most 0.2 points in {within(lines, 'a process per device', 0.2)}. In the steady state our "
            "program waits as little; what remains is warm-up and cool-down, where one program makes neighbors wait "
            f"for each other's transfers. {link}",
            table(lines, dict.fromkeys(("our program", "a process per device", "published generators"), ".1f")),
        ]
    )
