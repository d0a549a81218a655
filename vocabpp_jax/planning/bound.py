"""A lower bound on the time of a step's passes, from their durations alone."""

from __future__ import annotations

import numpy as np

from ..schedules import Durations, Schedule
from ..schedules.instructions import COLLECTIVES


def least_seconds(schedule: Schedule, durations: Durations, m: int, overlaps: bool = True) -> float:
    """A lower bound on the seconds that ``m`` microbatches take under a schedule; the schedule's own m does not matter.

    Every device runs its passes one after the other, starting no earlier than its first stage's first input can arrive;
    and the last gradient that leaves its first stage still has to pass through all stages before it.
    """
    p, stages = schedule.p, np.array(schedule.placement)
    F, B, W = (np.broadcast_to(getattr(durations, kind), len(stages)) for kind in "FBW")
    send = np.asarray(durations.transfer)
    hops = np.array([0.0, *(send[a, b] for a, b in zip(stages, stages[1:], strict=False))])
    before = np.concatenate([[0.0], np.cumsum(F + np.append(hops[1:], 0.0))[:-1]])
    behind = np.concatenate([[0.0], np.cumsum(B + np.append(hops[1:], 0.0))[:-1]])
    own = np.bincount(stages, F + B + (W if schedule.splits_backward else 0.0), p)
    if schedule.sharded:
        steps = {(step.op, step.name) for step in schedule.vocabulary.steps}
        waits = schedule.method == "interlaced" or not overlaps
        everywhere = sorted(s.name for s in schedule.vocabulary.steps if s.op == "run" and None not in s.at)
        own = own + sum(getattr(durations, name) for name in everywhere)
        own = own + sum(getattr(durations, name) for name in COLLECTIVES if waits and ("start", name) in steps)
    else:
        own[stages[-1]] += np.max(durations.H)
        own[stages[0]] += np.max(durations.IF) + np.max(durations.IB)
    first = np.array([np.flatnonzero(stages == d)[0] for d in range(p)])
    tail = 0.0 if schedule.splits_backward else behind[first]
    return float((before[first] + m * own + tail).max())
