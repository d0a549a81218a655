"""From GPUs and a model to a run: the schedule, method, stages, tensor and data axes, microbatch size and residuals
that are fastest and fit.

    python experiments/plan.py --model 21B --gpus 32 --gpu h100-80g --memory 75 --global-batch 256 --seq 4096
    python experiments/train.py --plan plan.json
    python experiments/plan.py --measure-cpu cpu.toml

Every choice is enumerated, those that cannot fit are dropped, and the rest are ranked by simulated step time. The best
few are compiled for that GPU, which needs jax's GPU packages but no GPU, and those whose compiled peak fits are kept.
Compiled results are cached in a folder, so the same command resumes where it stopped.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs here, and a GPU plugin would look for its GPU

from rich.console import Console

from command_line import plan_file
from command_line.options import ModelOptions, PipelineOptions
from command_line.parsing import (
    OptionalFloat,
    OptionalInt,
    OptionalStr,
    Result,
    fail,
    or_fail,
    parse,
    write_json,
    write_text,
)
from planning_run.compiling import Job, results
from planning_run.report import GIB, Refused, draw, reasons, table, table_of_timed
from vocabpp_jax import models, plan
from vocabpp_jax.compiled import target
from vocabpp_jax.planning import Choice, Plan, Ranked, Request
from vocabpp_jax.schedules import METHODS, SCHEDULES
from vocabpp_jax.schedules.simulation.cost import load_gpu

WIDTH = 170
"""Width of the table when not on a terminal."""
XLA_POOL = 0.75
"""XLA's default share of GPU memory, unless XLA_PYTHON_CLIENT_MEM_FRACTION overrides it."""


@dataclass(frozen=True)
class PlanOptions:
    """The available GPUs, the allowed choices, and where the plan goes."""

    gpus: int = 8
    """Number of GPUs; a plan uses all of them."""
    gpu: str = "h100-80g"
    """GPU and network: a100-80g, h100-80g, or a .toml file like those in schedules/simulation/gpus."""
    nodes_of: OptionalInt = None
    """GPUs in a node; default: as in the GPU's file."""
    memory: OptionalFloat = None
    """GiB of each GPU available to the compiled program; default: nine tenths of the GPU's memory."""
    global_batch: int = 256
    """Sequences per step, over all copies of the model."""
    max_tensor: int = 8
    """The largest tensor axis; it never leaves a node."""
    schedules: tuple[str, ...] = ("all",)
    """Pipeline schedules to consider, or all."""
    methods: tuple[str, ...] = ("all",)
    """Vocabulary methods to consider, or all."""
    stages: tuple[int, ...] = ()
    """Numbers of stages to consider; default all."""
    microbatch_sizes: tuple[int, ...] = ()
    """Sequences per microbatch to consider; default: powers of two up to 64."""
    show: int = 8
    """Number of plans to rank."""
    compile: int = 3
    """Number of fitting plans to compile."""
    no_compile: bool = False
    """Rank only; the memory estimate, with a margin, decides what fits."""
    jobs: int = 2
    """Plans to compile concurrently."""
    output: str = "plan.json"
    """File for the best plan, to run with train.py --plan."""
    json: OptionalStr = None
    """File for all plans as JSON, - for standard output."""
    plot: OptionalStr = None
    """Plot of time against memory (.png, .svg, .pdf)."""
    kept: str = "runs/plans"
    """Cache folder for compiled results."""
    measure_cpu: OptionalStr = None
    """Instead of planning, measure this machine's cores and write them to this .toml file, for use with --gpu."""
    time_steps: bool = False
    """Also time a step of every ranked plan on this machine's cores, one process per stage, and rank them by that."""
    model: ModelOptions = field(default_factory=lambda: ModelOptions(model="4B"))

    def __post_init__(self) -> None:
        for name, known in (("schedules", SCHEDULES), ("methods", METHODS)):
            if getattr(self, name) == ("all",):
                object.__setattr__(self, name, known)
        for name in ("show", "compile", "jobs", "nodes_of"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.plot and Path(self.plot).suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"plot is {self.plot}; its name must end in .png, .svg or .pdf")
        for name in ("measure_cpu", "output"):
            value, end = getattr(self, name), ".toml" if name == "measure_cpu" else ".json"
            if value and not value.endswith(end):
                raise ValueError(f"{name} is {value}; its name must end in {end}")

    def request(self) -> Request:
        """The planner's request. Raises ValueError if it is invalid."""
        gpu = load_gpu(self.gpu)
        if self.nodes_of is not None:
            gpu = dataclasses.replace(gpu, gpus_per_node=self.nodes_of)
        config = self.model.config()
        memory = 0.9 * gpu.memory_bytes if self.memory is None else self.memory * GIB
        if memory > gpu.memory_bytes:
            raise ValueError(
                f"memory is {self.memory:g}; {gpu.name} has {gpu.memory_bytes / GIB:.1f} GiB, so give less"
            )
        kept = plan.RESIDUALS if self.model.residuals is None else (config.residuals,)
        return Request(
            models.cost_sizes(config),
            {residuals: self.model.build(dataclasses.replace(config, residuals=residuals)) for residuals in kept},
            config.dtype,
            gpu,
            self.gpus,
            memory,
            self.global_batch,
            self.max_tensor,
            self.schedules,
            self.methods,
            microbatch_sizes=self.microbatch_sizes,
            stages=self.stages,
        )

    def run_of(self, request: Request, choice: Choice) -> tuple[ModelOptions, PipelineOptions]:
        """The options of train.py for a choice."""
        pipeline = PipelineOptions(
            schedule=choice.schedule,
            method=choice.method,
            stages=choice.stages,
            chunks=choice.chunks,
            redis_split=request.redis_split,
            data_parallel=choice.data,
            tensor_parallel=choice.tensor,
            microbatches=request.microbatches(choice),
            microbatch_size=choice.microbatch_size,
            no_overlap=not request.gpu.overlaps,
            shard_optimizer="on" if choice.shard_optimizer else "off",
        )
        return dataclasses.replace(self.model, residuals=choice.residuals), pipeline


def compiled(options: PlanOptions, ranked: Ranked, console: Console) -> tuple[list[Plan], list[Refused]]:
    """The first plans whose compiled peak fits, as many as requested, and those before them that do not fit."""
    request = ranked.plans[0].request
    jobs = (Job(options.gpu, *options.run_of(request, p.choice)) for p in ranked.plans)
    fit: list[Plan] = []
    refused: list[Refused] = []
    with console.status("compiling") as status:
        for each, found in zip(
            ranked.plans, results(jobs, Path(options.kept), options.jobs, status.update), strict=False
        ):
            if "refused" in found:
                refused.append(Refused(each, found["refused"]))
            elif found["peak_bytes"] > request.memory_bytes:
                reason = f"compiled, {found['peak_bytes'] / GIB:.1f} GiB of {request.memory_bytes / GIB:.1f}"
                refused.append(Refused(each, reason))
            else:
                fit.append(dataclasses.replace(each, compiled_bytes=found["peak_bytes"]))
                console.print(f"compiled in {found['seconds']:.0f} s: {each.choice}")
            if len(fit) == options.compile:
                break
    return fit, refused


def show(plans: Sequence[Plan], ranked: Ranked, refused: Sequence[Refused], console: Console) -> None:
    """Print the table, and why plans that looked better are not in it."""
    request = plans[0].request
    title = f"{request.gpus} × {request.gpu.name}, {request.global_batch} sequences of {request.sizes.seq} a step"
    console.print(table(plans, ranked.dropped, title))
    found = list(reasons(plans[0], ranked, refused))
    if found:
        console.print("looked better than the first, and dropped:", *(f"  {line}" for line in found), sep="\n")
    if bytes_needed(plans[0]) > XLA_POOL * request.gpu.memory_bytes:
        share = min(0.97, request.memory_bytes / request.gpu.memory_bytes)
        console.print(
            f"run it with XLA_PYTHON_CLIENT_MEM_FRACTION={share:.2f}: it needs more memory than XLA reserves by default"
        )


def bytes_needed(best: Plan) -> float:
    """Compiled if available, else estimated."""
    return best.estimated.peak if best.compiled_bytes is None else best.compiled_bytes


def record(plans: Sequence[Plan], ranked: Ranked, refused: Sequence[Refused], seconds: float) -> dict[str, Any]:
    """What ``--json`` writes."""
    dropped = [{"plan": str(r.plan.choice), "reason": r.reason} for r in refused]
    counts = {"choices": ranked.choices, "simulated": ranked.simulated, "ranking_seconds": seconds}
    return {
        "plans": [p.json() for p in plans],
        "refused": dropped,
        "why": list(reasons(plans[0], ranked, refused)),
    } | counts


def written(option: str, path: str, write: Callable[[], None]) -> None:
    """Write a file named by an option, or fail with a sentence if it cannot be written."""
    try:
        write()
    except OSError as problem:
        fail(f"{option} is {path}; it cannot be written: {problem.strerror}")


def on_cores(run: Callable[[Any], Result]) -> Result:
    """Run something on this machine's cores; if one of them fails, so does the command."""
    from planning_run import cpu  # imports the timing code, which ranking does not need
    from speed_measure.processes import GroupFailed

    try:
        return or_fail(lambda: run(cpu))
    except GroupFailed as problem:
        fail(str(problem).splitlines()[0], status=1)


def main(arguments: Sequence[str] | None = None) -> None:
    options = or_fail(lambda: parse(PlanOptions, __doc__, arguments))
    console = Console(stderr=options.json == "-", width=None if sys.stdout.isatty() else WIDTH)
    if options.measure_cpu:
        on_cores(lambda cpu: cpu.measure(Path(options.measure_cpu), console.print))
        return
    request = or_fail(options.request)
    compiles = not options.no_compile and bool(request.gpu.target)
    if compiles:
        # fail early if this machine cannot compile for the GPU
        or_fail(lambda: target.devices(load_gpu(options.gpu), options.gpus))
        written("kept", options.kept, lambda: Path(options.kept).mkdir(parents=True, exist_ok=True))
    ranking = plan.Ranking(request)
    began = time.monotonic()
    with console.status("ranking") as status:
        ranking.say = status.update
        ranked = or_fail(lambda: ranking.best(options.show))
    seconds = time.monotonic() - began
    console.print(f"{ranked.choices:,} choices ranked in {seconds:.0f} s, {ranked.simulated} simulations")
    if options.time_steps:
        run_of = lambda choice: options.run_of(request, choice)  # noqa: E731
        timed = on_cores(lambda cpu: cpu.timed(ranked.plans, run_of))
        console.print(table_of_timed(timed))
        found = [dataclasses.replace(each.plan, measured_seconds=each.median) for each in timed]
        ranked = dataclasses.replace(ranked, plans=tuple(sorted(found, key=lambda plan: plan.measured_seconds)))
    plans, refused = list(ranked.plans), []
    if compiles:
        plans, refused = compiled(options, ranked, console)
        if not plans:
            fail(f"none of the {len(refused)} best plans compiles and fits; the first: {refused[0].reason}")
    show(plans, ranked, refused, console)
    write_json(options.json, record(plans, ranked, refused, seconds), indent=1)
    model, pipeline = options.run_of(request, plans[0].choice)
    write_text("output", options.output, plan_file.to_text(model, pipeline, plans[0].json()))
    console.print(f"written to {options.output}: train.py --plan {options.output} runs it")
    if options.plot:
        smaller = ranking.smaller(plans[0])
        written("plot", options.plot, lambda: draw([*plans, *smaller], request, Path(options.plot)))


if __name__ == "__main__":
    main()
