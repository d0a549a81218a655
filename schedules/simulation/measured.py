"""Measured pass times, and the iteration time that they predict."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..build import build
from ..lowering.program import lower
from .durations import Durations
from .simulator import FREE, Rules, simulate
from .timeline import Timeline

# The share of the output layer's time spent in S: Algorithm 2 runs two of the three matrix products there, the others
# one.
S_SHARE = {"vocab-2": 2 / 3}
PUBLISHED_MICROBATCHES = 128


@dataclass(frozen=True)
class MeasuredRun:
    """One run under 1F1B: the mean time of every pass, one number per device, and of an iteration; milliseconds.

    F and B of the first and last device include an unsharded vocabulary layer. ``iteration_ms`` is None if only passes
    were measured.
    """

    method: str
    seq_length: int
    vocab_size: int
    F: tuple[float, ...]
    B: tuple[float, ...]
    S_and_T: tuple[float, ...]
    IF: tuple[float, ...]
    IB: tuple[float, ...]
    iteration_ms: float | None
    microbatches: int = PUBLISHED_MICROBATCHES

    @property
    def p(self) -> int:
        """Number of devices."""
        return len(self.F)

    def predict(self, network: Durations | None = None, rules: Rules = FREE, m: int | None = None) -> Timeline:
        """The simulated iteration, in milliseconds.

        Args:
            network: transfers and collectives, in milliseconds; free by default.
            rules: those of the measured framework; by default one process per device, like Megatron.
            m: microbatches; by default those of the run.
        """
        # The published redistribution differs from the baseline only in what stages hold, which the times include.
        method = "baseline" if self.method == "redis" else self.method
        program = lower(build("1f1b", method, p=self.p, m=m or self.microbatches))
        share = S_SHARE.get(self.method, 1 / 3)
        S, T = (tuple(part * x for x in self.S_and_T) for part in (share, 1 - share))
        durations = replace(
            network or Durations(),
            F=self.F,
            B=self.B,
            W=0.0,
            S=S,
            T=T,
            S1=0.0,
            S2=0.0,
            H=0.0,
            G=0.0,
            IF=self.IF,
            IB=self.IB,
        )
        return simulate(program, durations, rules)


_COLUMNS = {"F": "f_us", "B": "b_us", "S_and_T": "s_plus_t_us", "IF": "input_f_us", "IB": "input_b_us"}


def read_pass_times(text: str) -> tuple[MeasuredRun, ...]:
    """The runs in a CSV with the columns of ``docs/paper/pass_times_8xA100.csv``, times in microseconds.

    An optional column ``microbatches`` defaults to the published 128. ``iteration_ms`` may be empty.

    Raises:
        ValueError: no rows, a missing column, a cell that is not a time, or cells with different numbers of devices.
    """
    runs = []
    try:
        rows = list(csv.DictReader(io.StringIO(text.removeprefix("\ufeff"))))
    except csv.Error as problem:
        raise ValueError(f"the pass times are not CSV: {problem}") from None
    for number, row in enumerate(rows, start=1):
        try:
            times = {name: tuple(float(x) / 1e3 for x in row[column].split()) for name, column in _COLUMNS.items()}
            m = int(row.get("microbatches") or PUBLISHED_MICROBATCHES)
            run = MeasuredRun(
                row["method"],
                int(row["seq_length"]),
                int(row["vocab_size"]),
                **times,
                iteration_ms=float(row["iteration_ms"]) if row["iteration_ms"] else None,
                microbatches=m,
            )
        except KeyError as missing:
            raise ValueError(f"the pass times have no column {missing.args[0]!r}") from missing
        except (AttributeError, TypeError, ValueError) as problem:
            raise ValueError(f"row {number} of the pass times cannot be read: {problem}") from problem
        if not all(0 <= x < math.inf for cell in times.values() for x in cell) or not _is_time(run.iteration_ms):
            raise ValueError(f"row {number} of the pass times has a negative or infinite time; give microseconds")
        counts = {len(x) for x in times.values()}
        if len(counts) != 1 or 0 in counts:
            raise ValueError(
                f"row {number} of the pass times has cells of {sorted(counts)} numbers; give one per device in each"
            )
        runs.append(run)
    if not runs:
        raise ValueError("the pass times have no rows")
    return tuple(runs)


def _is_time(ms: float | None) -> bool:
    """Whether this is a valid iteration time, or not measured."""
    return ms is None or 0 < ms < math.inf


def errors(runs: Sequence[MeasuredRun], predicted: Sequence[float]) -> tuple[float, float] | None:
    """Mean and largest relative error of predicted iteration times, both positive; None if none was measured."""
    timed = [(run.iteration_ms, ms) for run, ms in zip(runs, predicted, strict=True) if run.iteration_ms is not None]
    found = [abs(ms / measured - 1) for measured, ms in timed]
    return (sum(found) / len(found), max(found)) if found else None
