"""Iterations predicted from measured pass times, beside the measured ones."""

from __future__ import annotations

import sys
from pathlib import Path

from simulation_run.simulate_options import RULES, SimulateOptions
from simulation_run.simulated import Result
from vocabpp_jax.schedules import build
from vocabpp_jax.schedules.simulation.measured import MeasuredRun, errors, read_pass_times


def against_measured(options: SimulateOptions) -> tuple[Result, list[dict]]:
    """The run that the options select, and predicted and measured times of all rows of the file."""
    path = Path(options.times)
    if not path.is_file():
        raise ValueError(f"times is {options.times!r}; there is no such file")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise ValueError(f"times is {options.times!r}, which cannot be read: {problem}") from None
    runs = read_pass_times(text)
    chosen = [
        r
        for r in runs
        if r.method == options.method
        and r.seq_length == (options.seq or r.seq_length)
        and r.vocab_size == (options.vocab_size or r.vocab_size)
    ]
    if not chosen:
        raise ValueError(
            f"times has no row of method {options.method!r} with this seq and vocab_size; its methods are "
            f"{', '.join(dict.fromkeys(r.method for r in runs))}"
        )
    results = {id(r): predict(options, r) for r in runs}
    rows = [
        {
            "method": r.method,
            "seq_length": r.seq_length,
            "vocab_size": r.vocab_size,
            "predicted_ms": results[id(r)].ms,
            "measured_ms": r.iteration_ms,
        }
        for r in runs
    ]
    print_rows(runs, rows, sys.stderr if options.json == "-" else sys.stdout)
    return results[id(chosen[0])], rows


def predict(options: SimulateOptions, measured: MeasuredRun) -> Result:
    """The iteration predicted from a run's measured pass times."""
    cost = options.cost(measured.seq_length, measured.vocab_size)
    network = cost.durations(build("1f1b", "vocab-2", p=measured.p, m=1)).scaled(1e3)
    timeline = measured.predict(network, RULES[options.rules or "free"], options.microbatches)
    return Result(timeline, cost)


def print_rows(runs, rows: list[dict], file) -> None:
    """Print one line per measured run, and the errors."""
    print(f"{'method':<13}{'seq':>6}{'vocabulary':>12}{'predicted ms':>14}{'measured ms':>13}{'error':>8}", file=file)
    for row in rows:
        measured, predicted = row["measured_ms"], row["predicted_ms"]
        beside = "" if measured is None else f"{measured:>13.1f}{predicted / measured - 1:>8.2%}"
        print(f"{row['method']:<13}{row['seq_length']:>6}{row['vocab_size']:>12}{predicted:>14.1f}{beside}", file=file)
    if found := errors(runs, [row["predicted_ms"] for row in rows]):
        print(f"error: {found[0]:.2%} on average, {found[1]:.2%} at most", file=file)
