"""Simulate a schedule before running it: time, bubble, MFU, memory; pictures and traces; all schedules side by side.

    python experiments/simulate.py --schedule v-half --method vocab-2 --stages 16 --model 7B --plot v-half.png
    python experiments/simulate.py --compare --stages 8 --model 4B --vocab-size 256000
    python experiments/simulate.py --times docs/paper/pass_times_8xA100.csv

Pass times come from a model's sizes and a GPU's roofline, or from a file of measurements.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from command_line.options import MOST_PASSES, check_tail
from command_line.parsing import OptionalInt, OptionalStr, fail, or_fail, parse, write_json
from vocabpp_jax import models
from vocabpp_jax.schedules import METHODS, SCHEDULES, Schedule, build, lower, methods_of
from vocabpp_jax.schedules.layers import redistributed
from vocabpp_jax.schedules.simulation import formats
from vocabpp_jax.schedules.simulation.cost import Cost, load_gpu
from vocabpp_jax.schedules.simulation.durations import Durations
from vocabpp_jax.schedules.simulation.measured import MeasuredRun, errors, read_pass_times
from vocabpp_jax.schedules.simulation.pictures import draw, save, title_of
from vocabpp_jax.schedules.simulation.simulator import COMPILED, FREE, GPU, ON_CPUS, Rules, simulate
from vocabpp_jax.schedules.simulation.timeline import Timeline

RULES = {"gpu": GPU, "asynchronous": Rules("asynchronous"), "blocking": COMPILED, "on-cpus": ON_CPUS, "free": FREE}
OptionalRules = Annotated[
    Literal["gpu", "asynchronous", "blocking", "on-cpus", "free"] | None, tyro.conf.arg(metavar="RULES")
]


@dataclass(frozen=True)
class SimulateOptions:
    """What to simulate, on what, and what to write."""

    schedule: str = "1f1b"
    """Pipeline schedule."""
    method: str = "vocab-2"
    """How the embedding and the LM head are computed."""
    stages: int = 8
    """Pipeline stages: devices that one copy of the model is spread over."""
    chunks: OptionalInt = None
    """With interleaved-1f1b: chunks per device; default 2."""
    redis_split: Literal["published", "optimal"] = "published"
    """With redis: layers per stage as in the published experiments, or minimizing the slowest stage's FLOPs."""
    microbatches: OptionalInt = None
    """Microbatches per step; default 32, or 128 with --times, as published."""
    microbatch_size: int = 1
    """Sequences per microbatch."""
    model: str = "4B"
    """Named size: gpt-tiny, gpt-mini, gpt-small, or one of the published 4B, 7B, 10B, 16B, 21B, 30B."""
    layers: OptionalInt = None
    """Transformer layers; default: the model's."""
    hidden: OptionalInt = None
    """Model width; default: the model's."""
    seq: OptionalInt = None
    """Sequence length in tokens; default: the model's."""
    vocab_size: OptionalInt = None
    """Vocabulary size; default: the model's."""
    tie_embeddings: bool = False
    """Use the token embedding as the LM head."""
    mtp_depth: int = 0
    """Further tokens to predict, each by one more layer after the last and the same LM head."""
    gpu: str = "a100-80g"
    """GPU and network: a100-80g, h100-80g, or a .toml file like those in schedules/simulation/gpus."""
    times: OptionalStr = None
    """CSV of measured pass times in the columns of docs/paper/pass_times_8xA100.csv. Prints predicted and measured
    iteration times of each row; the network is --gpu's."""
    no_overlap: bool = False
    """Wait for every collective of the vocabulary layers where it is issued, as suits CPUs."""
    durations: OptionalStr = None
    """Pass times in milliseconds that override the model's and the GPU's: F=466,B=549,W=405,transfer=4, or any other
    field of schedules.Durations. H=0 is a pipeline without a head."""
    plain: bool = False
    """Repeat the schedule's building block unchanged instead of fitting the order of passes to their durations."""
    rules: OptionalRules = None
    """What waits for what: gpu, one program for all devices whose transfers and collectives share a stream on each
    device; asynchronous, with a stream for every transfer; blocking, with transfers that block both ends; on-cpus, with
    collectives that block too; free, one process per device. Default: gpu, or free with --times."""
    compare: bool = False
    """Print every schedule with every method, sorted by time."""
    json: OptionalStr = None
    """Write the result as JSON to this file, or to standard output if it is -."""
    plot: OptionalStr = None
    """Draw the timeline to this .png or .svg file."""
    trace: OptionalStr = None
    """Write the timeline as a trace for ui.perfetto.dev to this file."""
    csv: OptionalStr = None
    """Write what each device runs to this file, in the CSV of torch.distributed.pipelining, which torch can run."""
    csv_vocabulary: bool = False
    """Also write the passes of the vocabulary layers to the CSV; torch then rejects it."""

    def cost(self, seq: int | None = None, vocab_size: int | None = None) -> Cost:
        """The cost model."""
        given = {
            "layers": self.layers,
            "hidden": self.hidden,
            "seq": seq or self.seq,
            "vocab_size": vocab_size or self.vocab_size,
            "tie_embeddings": self.tie_embeddings or None,
        }
        check_tail(self.mtp_depth)
        config = models.named(self.model, **{name: value for name, value in given.items() if value is not None})
        return Cost(models.cost_sizes(config, self.microbatch_size, self.mtp_depth), load_gpu(self.gpu))


@dataclass(frozen=True)
class Result:
    """A simulated iteration, in milliseconds, with derived metrics."""

    timeline: Timeline
    cost: Cost
    of_model: bool = True
    """Whether the durations come from the model; otherwise there is no MFU."""

    @property
    def ms(self) -> float:
        """Time of the iteration."""
        return self.timeline.makespan

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization, 0 to 1."""
        schedule = self.timeline.schedule
        return self.cost.mfu(schedule.m, schedule.p, self.ms / 1e3)

    @property
    def peak_bytes(self) -> tuple[float, ...]:
        """Estimated bytes on each device."""
        return self.cost.peak_bytes(self.timeline)

    def json(self) -> dict:
        """The numbers for ``--json``."""
        schedule, timeline = self.timeline.schedule, self.timeline
        return {
            "schedule": schedule.name,
            "method": schedule.method,
            "stages": schedule.p,
            "microbatches": schedule.m,
            "gpu": self.cost.gpu.name,
            "iteration_ms": self.ms,
            "bubble_ratio": timeline.bubble_ratio,
            "steady_bubble_ratio": timeline.steady_bubble,
            "longest_wait_ratio": timeline.longest_wait_ratio,
            "mfu": self.mfu if self.of_model else None,
            "busy_ms": timeline.busy.tolist(),
            "peak_in_flight": list(timeline.peak_in_flight),
            "peak_bytes": list(self.peak_bytes),
        }


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


def print_table(results: list[Result]) -> None:
    """Print one line per result."""
    head = ("schedule", "method", "ms", "bubble", "MFU", "in flight", "GiB most", "least")
    print("{:<18}{:<13}{:>9}{:>8}{:>8}{:>11}{:>10}{:>7}".format(*head))
    for r in results:
        schedule, peaks = r.timeline.schedule, r.peak_bytes
        # A chunk is part of what a device holds: count in flight in units of all chunks of one microbatch.
        held = max(r.timeline.peak_in_flight) / schedule.chunks
        full = "  more than the GPU has" if max(peaks) > r.cost.gpu.memory_bytes else ""
        mfu = f"{r.mfu:.1%}" if r.of_model else "-"
        print(
            f"{schedule.name:<18}{schedule.method:<13}{r.ms:>9.1f}{r.timeline.bubble_ratio:>8.1%}{mfu:>8}"
            f"{held:>11.4g}{max(peaks) / 2**30:>10.1f}{min(peaks) / 2**30:>7.1f}{full}"
        )


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
