"""1F1B with vocabulary passes placed for given durations: a search that minimises simulated time in bounded memory.

The plain construction (:mod:`.vocabulary`) puts passes on a grid of thirds, which is exact where a backward takes twice
a forward. Elsewhere the devices' phases drift off the grid, until S of a microbatch stands in the wrong interval on
some of them. Here the grid follows the durations. Two ideas:

* *Compressed time*. Leave S and T out and repeat the passes every F + B without a gap: F of microbatch j on the device
  n hops before the last ends at j(F+B) - nF, its B at (j+q)(F+B) + (n+1)B, q intervals being inserted. A slot of the
  program is 1/K of F + B. S then stands behind the same slot on all devices; one that is inside a pass there runs S
  before that pass, which costs nothing, since all devices are delayed by one S in an interval.
* *Halves*. A device cannot stop inside a pass, and Algorithm 2 needs each of them twice, for S and for scaling what S
  made to the global maximum, between the last stage's F and its B, that is within F + B. So a device holds its layers
  as two consecutive stages; then it comes to a boundary every max(F, B)/2. Layers and activations are the same.

What is left to choose is K, the rounding of times to slots, and the slots of S and T: a handful, which are simulated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import ceil, floor

import numpy as np

from .build import build
from .lowering.program import lower
from .schedule import AFTER, BEFORE, LANDINGS, Op, Pass, Schedule, Step, Vocabulary
from .simulation.simulator import COMPILED, Durations, Rules, simulate

INSERTED = {"interlaced": 0, "vocab-2": 1, "vocab-1": 2}
Builder = Callable[[int], Schedule | None]  # from m
_TINY = 1e-9
_GOOD = 0.02  # a steady bubble for which the other number of stages a device is not tried


@dataclass(frozen=True)
class Placement:
    """Where passes, S and T stand.

    Attributes:
        F, B: times that shape the grid, of all of a device's layers.
        parts: stages a device, 1 or 2.
        K: slots of an interval.
        rounding: what is added to a time in slots before it is cut to a slot; near 1, a slot holds what ends in it.
        S, T: slots after the last stage's F behind which S and, of the same microbatch, T stand.
    """

    F: float
    B: float
    parts: int
    K: int
    rounding: float
    S: int
    T: int

    def slot(self, time: float) -> int:
        """The slot in which a pass that ends at ``time`` stands."""
        return floor(time * self.K / (self.F + self.B) + self.rounding + _TINY)


def place(
    method: str,
    p: int,
    m: int,
    durations: Callable[[Schedule], Durations],
    *,
    rules: Rules = COMPILED,
    halves: bool = True,
    enough: float = 0.002,
) -> tuple[Schedule, float]:
    """The 1F1B schedule with the smallest steady bubble at its method's in-flight bound, and that bubble.

    In flight on device r: p-r+2 for vocab-1, p-r+1 for vocab-2, p-r for interlaced (published: floor(3p/2)-r).

    Args:
        method: vocab-1, vocab-2 or interlaced.
        p, m: devices, microbatches.
        durations: of a schedule's passes, for example :meth:`.simulation.cost.Cost.durations`.
        rules: of the simulation.
        halves: whether devices may hold their layers as two stages, for which each needs two layers.
        enough: a steady bubble, beyond what transfers cost any schedule, that ends the search.

    Raises:
        ValueError: another method.
    """
    if method not in INSERTED:
        raise ValueError(f"method is {method!r}; placement is for {', '.join(INSERTED)}")
    plain = build("1f1b", method, p=p, m=1)
    given = durations(plain)
    F, B = (float(given.of(plain, kind).mean()) for kind in "FB")
    if p > 1 and rules.transfers == "blocking":
        enough += 2 * float(np.mean(given.transfer)) / (F + B)
    best: tuple[float, Builder] | None = None
    trial = min(m, 3 * p + 12)  # long enough for the steady state
    for builders, satisfied in _rounds(method, p, F, B, halves, enough):
        for builder in builders:
            schedule = builder(trial)
            bubble = None if schedule is None else _bubble(schedule, durations, rules)
            if bubble is not None and (best is None or bubble < best[0] - enough / 2):
                best = bubble, builder
            if best is not None and best[0] < enough:
                break
        if best is not None and best[0] < satisfied:
            break
    if best is None:
        raise ValueError(f"no placement fits F of {F:.4g} and B of {B:.4g}; a backward takes one to three forwards")
    return best[1](m), best[0]


def _bubble(schedule: Schedule, durations: Callable[[Schedule], Durations], rules: Rules) -> float | None:
    try:
        program = lower(schedule)
    except ValueError:  # S, T or a sum is not in time
        return None
    return simulate(program, durations(schedule), rules).steady_bubble


def _rounds(
    method: str, p: int, F: float, B: float, halves: bool, enough: float
) -> Iterator[tuple[Iterator[Builder], float]]:
    """What to try, small programs first, and the steady bubble for which the next round is not tried."""
    if method != "interlaced":  # which holds half as much again there
        yield iter([lambda m: build("1f1b", method, p=p, m=m)]), enough
    for parts in (1, 2) if method == "vocab-1" else (2, 1):
        if parts == 1 or halves:
            yield (partial(_schedule, at, method, p) for at in _placements(method, F, B, parts)), _GOOD


def _placements(method: str, F: float, B: float, parts: int) -> Iterator[Placement]:
    """Placements worth simulating."""
    fewest = ceil(parts * (F + B) / min(F, B) - _TINY)  # slots in which no two passes of a device meet
    for K in range(fewest, fewest + 3):
        stop = ceil(K * max(F, B) / parts / (F + B) - _TINY)  # slots in which every device comes to a boundary
        if method == "interlaced":
            yield from (Placement(F, B, parts, K, rounding, 0, 0) for rounding in (0.95, 0.5))
            continue
        latest = K if method == "vocab-2" else 2 * stop + 1
        T = sorted(range(stop + 1, latest + 1), key=lambda t: (abs(t - 2 * stop), -t))
        for S in (stop, stop + 1):
            yield from (Placement(F, B, parts, K, r, S, t) for t in T if t > S for r in (0.95, 0.5))


# --- from a placement to a schedule ----------------------------------------------------------------------------------


def _schedule(at: Placement, method: str, p: int, m: int) -> Schedule | None:
    """The schedule, or None where two passes of a device would stand in one slot."""
    K, parts, q = at.K, at.parts, INSERTED[method]
    passes = []
    for d in range(p):
        hops, zeroth = p - 1 - d, []
        for part in range(parts):
            F_ends = -hops * at.F - at.F * (parts - 1 - part) / parts
            B_ends = q * (at.F + at.B) + hops * at.B + at.B * (part + 1) / parts
            zeroth += [("F", parts * d + part, at.slot(F_ends)), ("B", parts * d + parts - 1 - part, at.slot(B_ends))]
        if len({slot % K for *_, slot in zeroth}) < len(zeroth):
            return None
        mine = [Pass(kind, stage, i, slot + i * K) for i in range(m) for kind, stage, slot in zeroth]
        passes.append(tuple(sorted(mine, key=lambda x: x.start)))
    steps = tuple(_Steps(at, p).of(method))
    return Schedule(
        "1f1b placed",
        p,
        m,
        K,
        tuple(s // parts for s in range(parts * p)),
        tuple(passes),
        Vocabulary(method, steps, tuple(i * K for i in range(m)), q),
    )


class _Steps:
    """The vocabulary layers' steps. Collectives are listed in the order in which they use the network."""

    def __init__(self, at: Placement, p: int):
        self.at, self.p = at, p
        self.end = at.slot(0.0)  # of the last stage's F; an interval opens in the slot after it
        self.first_F = at.slot(-(p - 1) * at.F - at.F * (at.parts - 1) / at.parts)

    def everywhere(self, op: Op, name: str, slot: int, place: int = AFTER) -> Step:
        return Step(op, name, (slot,) * self.p, place)

    def on_last(self, name: str, slot: int, place: int = AFTER) -> Step:
        return Step("run", name, (*(None,) * (self.p - 1), slot), place)

    def closes(self, slot: int) -> int:
        """The last slot of the interval that a slot is in."""
        return slot + self.at.K - 1 - (slot - self.end - 1) % self.at.K

    def of(self, method: str) -> list[Step]:
        at, end, K = self.at, self.end, self.at.K
        period, q = at.F + at.B, INSERTED[method]
        last_B = at.slot(q * period + at.B / at.parts)  # the last stage's
        IB = at.slot(q * period + self.p * at.B) + 1
        if method == "interlaced":
            return self.interlaced(IB)
        S, T = end + at.S, end + at.T + 1
        opens_IB = IB + (end + 1 - IB) % K
        opens_IF = end + 1 + (self.first_F - K - end - 1) // K * K
        if method == "vocab-2":
            # T hides the sum from the last stage, which has nothing else to do between them.
            done, place = min((last_B, BEFORE), (self.closes(T), LANDINGS))
            opening = [
                self.everywhere("start", "big", T, BEFORE),
                self.everywhere("start", "C0", end + 1, BEFORE),
                self.everywhere("run", "T", T, BEFORE),
            ]
        else:
            done, place = min(last_B - 1, self.closes(T)), LANDINGS
            opening = [
                self.everywhere("start", "C0", end + 1, BEFORE),
                self.everywhere("run", "T", T, BEFORE),
                self.everywhere("start", "big", T, BEFORE),
            ]
        return [
            *opening,
            self.everywhere("run", "IF", opens_IF, BEFORE),
            self.everywhere("start", "CI", opens_IF, BEFORE),
            self.everywhere("start", "CB", opens_IB, BEFORE),
            self.everywhere("done", "big", done, place),
            self.on_last("G", done, BEFORE if place == BEFORE else AFTER),
            self.everywhere("done", "C0", S),
            self.everywhere("run", "S", S),
            self.everywhere("start", "stats", S),
            self.everywhere("done", "stats", T - 1),
            self.everywhere("done", "CI", opens_IF + K - 1, LANDINGS),
            self.everywhere("done", "CB", opens_IB + K - 1, LANDINGS),
            self.everywhere("run", "IB", opens_IB + K - 1),
        ]

    def interlaced(self, IB: int) -> list[Step]:
        """The output layer behind the last stage's F, every collective waited for; the input layer beside passes."""
        K, end = self.at.K, self.end
        opens_IF = end + 1 + (self.first_F - K - end) // K * K
        opens_IB = IB + (end + 1 - IB) % K
        together = [
            ("start", "C0"),
            ("done", "C0"),
            ("run", "S"),
            ("start", "stats"),
            ("done", "stats"),
            ("run", "T"),
            ("start", "big"),
            ("done", "big"),
        ]
        return [
            *(self.everywhere(op, name, end) for op, name in together),
            self.on_last("G", end),
            self.everywhere("run", "IF", opens_IF, BEFORE),
            self.everywhere("start", "CI", opens_IF, BEFORE),
            self.everywhere("start", "CB", opens_IB, BEFORE),
            self.everywhere("done", "CI", opens_IF + K - 2, LANDINGS),
            self.everywhere("done", "CB", opens_IB + K - 2, LANDINGS),
            self.everywhere("run", "IB", opens_IB + K - 2),
        ]
