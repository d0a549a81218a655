"""How long everything in a program takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, make_dataclass, replace
from typing import Any

import numpy as np

from ..instructions import COLLECTIVES, KINDS, STAGE_PASSES
from ..schedule import Schedule

Times = float | Sequence[float]


class _OfTable:
    """Operations on durations; the fields come from the instruction table."""

    def scaled(self, factor: float) -> Durations:
        """The same in another unit of time."""
        return Durations(**{f.name: _plain(np.asarray(getattr(self, f.name), float) * factor) for f in fields(self)})

    def without_collectives(self) -> Durations:
        """The same passes and transfers, with collectives that take no time."""
        return replace(self, **dict.fromkeys(COLLECTIVES, 0.0))

    def of(self, schedule: Schedule, kind: str, chunk: int = 0) -> np.ndarray:
        """The duration of a pass on every device, ``[p]``.

        Raises:
            ValueError: the number of durations matches neither stages nor devices.
        """
        times = np.asarray(getattr(self, kind), float)
        if times.ndim == 0:
            return np.full(schedule.p, float(times))
        per_stage = kind in STAGE_PASSES
        if len(times) != (schedule.stages if per_stage else schedule.p):
            raise ValueError(
                f"{kind} has {len(times)} durations; give one, or one "
                f"{'per stage' if per_stage else 'per device'}: {schedule.stages if per_stage else schedule.p}"
            )
        return times[schedule.stage_of[chunk]] if per_stage else times


Durations = make_dataclass(
    "Durations",
    [
        *((kind.name, float if kind.runs == "together" else Times, kind.duration) for kind in KINDS.values()),
        ("transfer", float | Sequence[Sequence[float]], 0.0),
        ("overhead", float, 0.0),
    ],
    bases=(_OfTable,),
    frozen=True,
    namespace={"__module__": __name__},
)
Durations.__doc__ = f"""How long everything takes, in any one unit of time (seconds where it comes from a cost model).

    Attributes:
        {", ".join(STAGE_PASSES)}: one number, or one per stage. B is the whole backward if the schedule has no W.
        {", ".join(k for k in KINDS if k not in STAGE_PASSES and k not in COLLECTIVES)}: the vocabulary passes; one
            number, or one per device.
        {", ".join(COLLECTIVES)}: the collectives.
        transfer: one permute between neighbors; one number, or one per pair as ``[source, target]``.
        overhead: added to every ``run`` on every device, whether the pass runs there or not: the host reads the
            predicate of its loop. Only if the rules say ``idle``; other programs have no such loops.
"""


def _plain(times: np.ndarray) -> Any:
    """A number, or nested tuples of them."""
    return tuple(map(_plain, times)) if times.ndim else float(times)
