"""Simulate a schedule before running it: time, bubble, MFU, memory; pictures and traces; all schedules side by side.

    python experiments/simulate.py --schedule v-half --method vocab-2 --stages 16 --model 7B --plot v-half.png
    python experiments/simulate.py --compare --stages 8 --model 4B --vocab-size 256000
    python experiments/simulate.py --times docs/paper/pass_times_8xA100.csv

Pass times come from a model's sizes and a GPU's roofline, or from a file of measurements.
"""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from pathlib import Path

from simulation_run.against_measured import against_measured
from simulation_run.simulate_options import RULES, SimulateOptions
from simulation_run.simulated import Result, print_table

from command_line.parsing import fail, or_fail, parse, write_json
from vocabpp_jax.schedules import METHODS, SCHEDULES, Schedule, build, lower, methods_of
from vocabpp_jax.schedules.layers import redistributed
from vocabpp_jax.schedules.schedule import MOST_PASSES
from vocabpp_jax.schedules.simulation import formats
from vocabpp_jax.schedules.simulation.durations import Durations
from vocabpp_jax.schedules.simulation.pictures import draw, save, title_of
from vocabpp_jax.schedules.simulation.simulator import simulate


def given_durations(text: str) -> Durations:
    """Durations from ``F=466,B=549``. Raises ValueError for an unknown field or an invalid time."""
    names, found = [f.name for f in fields(Durations)], {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name.strip() not in names:
            raise ValueError(f"durations has {part.strip()!r}; give NAME=NUMBER, with the names {', '.join(names)}")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            found[name.strip()] = -1.0
        if not 0 <= found[name.strip()] < float("inf"):
            raise ValueError(f"durations has {part.strip()!r}; a duration is a number that is not negative")
    if not any(found.get(name, default) for name, default in (("F", 1.0), ("B", 2.0), ("W", 0.0))):
        raise ValueError(f"durations is {text!r}; F, B or W must take some time")
    return Durations(**found)


def run(options: SimulateOptions, schedule: str, method: str) -> Result:
    """Simulate one schedule with one method."""
    if max(1, options.stages) * (options.microbatches or 1) > MOST_PASSES:
        raise ValueError(
            f"stages {options.stages} times microbatches {options.microbatches} must be at most {MOST_PASSES}"
        )
    cost, m, rules = options.cost(), options.microbatches or 32, RULES[options.rules or "gpu"]
    counts, z = None, cost.sizes
    if method == "redis":
        counts = redistributed(
            options.redis_split,
            layers=z.layers,
            stages=options.stages,
            rho=z.ends_in_layers,
        )
    given = given_durations(options.durations) if options.durations else None

    def durations(built: Schedule) -> Durations:
        return given or cost.durations(built).scaled(1e3)

    built = build(
        schedule,
        method,
        p=options.stages,
        m=m,
        chunks=options.chunks,
        layer_counts=counts,
        durations=None if options.plain else durations,
        rules=rules,
        overlap=not options.no_overlap,
    )
    built = replace(built, depths=z.depths)
    return Result(simulate(lower(built), durations(built), rules), cost, given is None)


def compare(options: SimulateOptions) -> list[Result]:
    """All combinations, fastest first; those that cannot be built are reported on standard error."""
    options.cost()  # an invalid model or GPU would fail all of them
    results, left_out = [], []
    for schedule, method in [(name, method) for name in SCHEDULES for method in methods_of(name)]:
        try:
            results.append(run(options, schedule, method))
        except ValueError as problem:
            left_out.append(f"{schedule} with {method}: {problem}")
    if not results:
        raise ValueError(f"nothing can be built; {left_out[0]}")
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    return sorted(results, key=lambda r: r.ms)


def write(options: SimulateOptions, result: Result, data: dict) -> None:
    """Write the requested files."""
    if options.plot:
        save(draw({title_of(result.timeline): result.timeline}, "ms"), options.plot)
    if options.trace:
        Path(options.trace).write_text(formats.to_trace(result.timeline, microseconds=1e3))
    if options.csv:
        Path(options.csv).write_text(formats.to_csv(result.timeline.schedule, options.csv_vocabulary))
    write_json(options.json, data)


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    options = parse(SimulateOptions, __doc__, arguments)
    if options.schedule not in SCHEDULES:
        fail(f"schedule is {options.schedule!r}; the schedules are {', '.join(SCHEDULES)}")
    if options.method not in METHODS:
        fail(f"method is {options.method!r}; the methods are {', '.join(METHODS)}")
    if options.times:
        result, rows = or_fail(lambda: against_measured(options))
        data = result.json() | {"rows": rows}
    elif options.compare:
        results = or_fail(lambda: compare(options))
        result, data = results[0], {"results": [r.json() for r in results]}
        if options.json != "-":
            print_table(results)
    else:
        result = or_fail(lambda: run(options, options.schedule, options.method))
        data = result.json()
        if options.json != "-":
            print_table([result])
    try:
        or_fail(lambda: write(options, result, data))
    except OSError as problem:
        if problem.filename is None:
            raise
        fail(f"{problem.filename} cannot be written: {problem.strerror}")


if __name__ == "__main__":
    main()
