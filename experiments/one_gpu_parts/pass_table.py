"""Measured passes in the columns of ``docs/paper/pass_times_8xA100.csv``, which ``simulate.py --times`` reads."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from vocabpp_jax.schedules import Schedule
from vocabpp_jax.schedules.simulation.cost import load_gpu

from .gpu_measurements import Measured, schedule_of
from .gpu_sizes import Row, Size

COLUMNS = (
    "method seq_length vocab_size last_stage_layers f_us b_us s_plus_t_us input_f_us input_b_us p2p_us iteration_ms"
)
METHODS = ("baseline", "redis", "vocab-2", "vocab-1", "interlaced")


def write(measured: Measured, size: Size, folder: Path) -> list[Path]:
    """Write one file per model and number of devices with measurements; returns their paths."""
    written = []
    for model, p in dict.fromkeys((row.model, row.p) for row in size.rows):
        rows = [line for row in size.rows if (row.model, row.p) == (model, p) for line in _lines(measured, row)]
        if rows:
            path = folder / f"pass_times_{model}_{p}.csv"
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS.split(), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
            written.append(path)
    return written


def _lines(measured: Measured, row: Row) -> list[dict[str, Any]]:
    found = []
    for seq in row.sequences:
        for V in row.vocabularies:
            for method in METHODS:
                schedule = schedule_of(method, row.model, row.p, 1, seq, V)
                line = _line(measured, row, seq, V, schedule)
                found += [line] if line else []
    return found


def _line(measured: Measured, row: Row, seq: int, V: int, schedule: Schedule) -> dict[str, Any] | None:
    """One row of the table. The last device's head, or G, is counted in its backward."""
    durations = measured.durations(row.model, row.p, seq, V, schedule, load_gpu("h100-80g"))
    if durations is None:
        return None
    F, B = list(durations.F), list(durations.B)
    sharded = schedule.sharded
    B[-1] += durations.G if sharded else durations.H
    if not sharded:
        F[0] += durations.IF
        B[0] += durations.IB

    def cell(values: list[float]) -> str:
        return " ".join(f"{1e6 * x:.0f}" for x in values)

    def each(value: float) -> str:
        return cell([value if sharded else 0.0] * row.p)

    return {
        "method": schedule.method,
        "seq_length": seq,
        "vocab_size": V,
        "last_stage_layers": (schedule.layer_counts or [""])[-1],
        "f_us": cell(F),
        "b_us": cell(B),
        "s_plus_t_us": each(durations.S + durations.T),
        "input_f_us": each(durations.IF),
        "input_b_us": each(durations.IB),
        "p2p_us": "",
        "iteration_ms": "",
    }
