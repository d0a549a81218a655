"""Measure all methods and schedules side by side on real hardware: one process per stage, each with its own core or
GPU.

    python experiments/speed.py --methods baseline redis vocab-2 --docs docs/speed.md
    python experiments/speed.py --schedules all --methods baseline vocab-2 --vocab-sizes 53248 --layers 4

For each vocabulary size it starts one group of processes, compiles everything, and times all in turns, so that whatever
slows the machine down slows all of them. The ideal is the same work divided evenly without waiting: every device runs
its share of the microbatches through the whole model on its own, all at the same time. It also times every pass and has
the simulator predict the step. A step is loss and gradients, without the optimizer.

Measured vocabulary sizes are kept in the output folder, and an interrupted run resumes after them. On a cluster, start
it once per GPU, with --distributed or a coordinator.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import jax

from command_line.options import ClusterOptions, ModelOptions, PipelineOptions
from command_line.parsing import OptionalStr, fail, or_fail, parse, write_json
from comparators import COMPARATORS, EVEN_SHARE
from reports.markdown import insert_table
from speed_measure import speed_stage
from speed_measure.processes import Group, GroupFailed, Here, free_port
from speed_measure.speed_report import rows_of, write_report
from speed_measure.turns import Left, countdown, in_turns, say
from vocabpp_jax.models import model_flops
from vocabpp_jax.schedules import METHODS, SCHEDULES, methods_of


@dataclass(frozen=True)
class SpeedOptions:
    """What to measure, for how long, and where the result goes."""

    methods: tuple[str, ...] = ("baseline", "redis", "vocab-1", "vocab-2")
    """Vocabulary methods, or all. Those that a schedule does not support are skipped."""
    schedules: tuple[str, ...] = ("1f1b",)
    """Pipeline schedules, or all."""
    vocab_sizes: tuple[int, ...] = (13312, 26624, 53248)
    """Vocabulary sizes to measure."""
    comparators: tuple[str, ...] = ()
    """Other ways to use the same devices: spmd-pipeline, a pipeline by autodiff with the head outside it;
    data-parallel, copies of the model; fsdp, parameters sharded over the devices."""
    repeats: int = 3
    """Rounds, each timing everything once; fewer if time runs out."""
    minutes: float = 60.0
    """Time limit for the whole run, in minutes. Each vocabulary size gets a share according to its FLOPs."""
    no_passes: bool = False
    """Do not time the passes; nothing is predicted then."""
    output: str = "runs/speed"
    """Folder for speed.csv, speed.md, speed.png, and one file with all measurements per vocabulary size."""
    json: OptionalStr = None
    """File for the rows as JSON, - for standard output."""
    docs: OptionalStr = None
    """Markdown page whose table of these measurements is replaced; runs with comparators have a table of their own."""
    gpus: bool = False
    """Give each stage a GPU of this machine instead of a core."""
    share_cores: bool = False
    """Continue even if there are fewer cores than stages. Such times say nothing about the schedules."""
    model: ModelOptions = field(
        default_factory=lambda: ModelOptions(model="gpt-mini", layers=2, hidden=1024, heads=8, seq=512)
    )
    pipeline: PipelineOptions = field(
        default_factory=lambda: PipelineOptions(stages=2, microbatches=36, microbatch_size=1)
    )
    cluster: ClusterOptions = field(default_factory=ClusterOptions)

    def __post_init__(self) -> None:
        for name in ("methods", "schedules"):
            known = METHODS if name == "methods" else SCHEDULES
            if getattr(self, name) == ("all",):
                object.__setattr__(self, name, known)
            for value in getattr(self, name):
                if value not in known:
                    raise ValueError(f"{name} has {value!r}; they are {', '.join(known)}, or all")
        for name in self.comparators:
            if name not in COMPARATORS or name == EVEN_SHARE:
                others = ", ".join(other for other in COMPARATORS if other != EVEN_SHARE)
                raise ValueError(f"comparators has {name!r}; they are {others}")
        given = self.pipeline
        if (given.schedule, given.method) != (PipelineOptions.schedule, PipelineOptions.method):
            raise ValueError("schedule and method are for one pipeline; here they are schedules and methods")
        self.model.refuse_other_losses()
        if self.model.vocab_size is not None:
            raise ValueError(f"vocab_size is {self.model.vocab_size}; here it is vocab_sizes, and may be one")
        for name in ("repeats", "minutes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")

    @property
    def in_cluster(self) -> bool:
        """Whether this process is one of the stages."""
        return self.cluster.distributed or self.cluster.coordinator is not None

    @property
    def writes(self) -> bool:
        """Whether this process writes the report."""
        return not self.in_cluster or jax.process_index() == 0

    def cases(self) -> dict[str, tuple[str, str]]:
        """Schedule and method of each of our pipelines."""
        return {f"{s} {m}": (s, m) for s in self.schedules for m in self.methods if m in methods_of(s)}

    def at(self, vocab_size: int) -> ModelOptions:
        """The model with one vocabulary size."""
        return dataclasses.replace(self.model, vocab_size=vocab_size)

    def shares(self) -> dict[int, float]:
        """Seconds for each vocabulary size."""
        flops = {v: model_flops(self.at(v).config()) for v in self.vocab_sizes}
        return {v: 60 * self.minutes * f / sum(flops.values()) for v, f in flops.items()}


@contextmanager
def stages(options: SpeedOptions, limit_s: float) -> Iterator[tuple[Any, dict]]:
    """A group whose ranks have found each other, and what it runs on."""
    if options.in_cluster:
        group = Here(speed_stage.handlers())
        yield group, group.ask("describe", limit_s)[0]
        return
    script, p = speed_stage.STAGE_SCRIPT, options.pipeline.stages
    with Group(script, p, options.gpus, options.share_cores) as group:
        yield group, join(group, limit_s)


def join(group: Group, limit_s: float) -> dict[str, Any]:
    """Make the ranks of a group find each other."""
    coordinator = f"127.0.0.1:{free_port()}"
    return group.ask("join", limit_s, coordinator=coordinator, ranks=group.ranks)[0]


def measure(options: SpeedOptions, vocab_size: int, limit_s: float) -> dict[str, Any]:
    """Everything for one vocabulary size, all in turns. Ends in time: with fewer rounds, or by raising GroupFailed."""
    left = countdown(limit_s)
    result: dict[str, Any] = {"vocab_size": vocab_size, "contenders": {}, "left_out": {}}
    with stages(options, left()) as (group, devices):
        result |= {"devices": devices}
        prepare(options, group, result, left)
        found = result["contenders"]
        names = [name for name in options.cases() if name in found and not options.no_passes]
        for name in names:
            group.ask("prepare_passes", left(), name=name)
        say(f"V={vocab_size}: compiled {len(found)} programs, {left():.0f} s left")
        asked, passes_of = {name: (group, name) for name in found}, group if names else None
        for name, times in in_turns(asked, options.repeats, left, f"V={vocab_size}: ", passes_of).items():
            found[name] |= dataclasses.asdict(times)
        predict(group, result, names, left)
    return result


def prepare(options: SpeedOptions, group: Any, result: dict[str, Any], left: Left) -> None:
    """Build and compile everything, or record it as left out."""
    model, platform, cases = options.at(result["vocab_size"]), result["devices"]["platform"], options.cases()
    for name in (EVEN_SHARE, *cases, *options.comparators):
        schedule, method = cases.get(name, ("1f1b", "vocab-2"))
        arguments = speed_stage.request(model, options.pipeline, platform, schedule=schedule, method=method)
        try:
            ready = group.ask("prepare", left(), name=name, comparator=None if name in cases else name, **arguments)
        except ValueError as problem:
            if name == EVEN_SHARE:
                raise
            say(f"left out: {name}: {problem}")
            result["left_out"][name] = str(problem)
            continue
        result["contenders"][name] = {"compile": ready[0]}


def predict(group: Any, result: dict[str, Any], names: list[str], left: Left) -> None:
    """Record the simulator's predictions from our measured passes."""
    for name in names:
        of = result["contenders"][name]
        of["prediction"] = group.ask("predict", left(), name=name)[0]
        predicted, took = of["prediction"]["predicted_ms"], 1e3 * median(of["seconds"])
        say(f"V={result['vocab_size']}: {name}: predicted {predicted:.0f} ms, measured {took:.0f} ms")


def kept_or_measured(options: SpeedOptions, vocab_size: int, limit_s: float) -> dict[str, Any]:
    """The output folder's result for a vocabulary size, or else a new measurement, which is stored there."""
    file = Path(options.output) / f"measured-{vocab_size}.json"
    request = dataclasses.asdict(options)
    for name in ("minutes", "output", "json", "docs", "vocab_sizes", "cluster"):
        del request[name]
    request = json.loads(json.dumps(request | {"jax": jax.__version__}))
    if file.exists():
        found = json.loads(file.read_text())
        if found["request"] != request:
            raise ValueError(
                f"output is {options.output!r}, which holds other measurements; give another folder or remove it"
            )
        return found
    found = measure(options, vocab_size, limit_s) | {"request": request}
    if options.writes:
        unfinished = file.with_suffix(".part")
        unfinished.write_text(json.dumps(found, indent=1) + "\n")
        unfinished.replace(file)
    return found


def main(arguments: list[str] | None = None) -> None:
    options = or_fail(lambda: parse(SpeedOptions, __doc__, arguments))
    shares = or_fail(options.shares)
    if options.in_cluster:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        or_fail(lambda: options.cluster.join(options.pipeline.stages))
    folder = Path(options.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        fail(f"output is {options.output!r}, which cannot be written: {problem.strerror}")
    say(f"{len(options.cases())} pipelines with {len(shares)} vocabularies, at most {options.minutes:g} minutes")
    try:
        results = [or_fail(lambda v=v, s=s: kept_or_measured(options, v, s)) for v, s in shares.items()]
    except GroupFailed as problem:
        say(f"error: {problem}")
        raise SystemExit(1) from None
    if options.writes:
        report(options, rows_of(results, options.at(2).config().seq, options.pipeline))


def report(options: SpeedOptions, found: dict[str, Any]) -> None:
    """Write everything that was requested."""
    table = write_report(Path(options.output), found)
    print(table, file=sys.stderr if options.json == "-" else sys.stdout)
    write_json(options.json, found)
    if options.docs:
        or_fail(lambda: insert_table(Path(options.docs), "speed-others" if options.comparators else "speed", table))


if __name__ == "__main__":
    main()
