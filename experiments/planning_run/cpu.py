"""Describes this machine's cores to the planner as a GPU: a file of constants, from passes timed on two cores.

Two processes, each on its own core, run the passes of a few small pipelines as the executor does
(:mod:`speed_measure.speed_passes`). The constants are fitted to these passes by least squares over logarithms. The cost
model counts bfloat16 bytes, so what a float32 pass moves is part of the constants.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from command_line.options import ModelOptions, PipelineOptions
from planning_run.report import Timed
from reports.least_squares import Constants, gauss_newton
from speed_measure import speed_stage
from speed_measure.processes import Group, free_port
from speed_measure.turns import countdown, in_turns
from vocabpp_jax import models
from vocabpp_jax.planning import Plan
from vocabpp_jax.schedules import build as build_schedule
from vocabpp_jax.schedules.simulation.cost import GPU, Cost

CASES = tuple(
    (ModelOptions(model="gpt-mini", layers=4, hidden=hidden, heads=8, seq=128, vocab_size=V), method, size)
    for hidden, V in ((128, 16384), (256, 4096))
    for method, size in itertools.product(("baseline", "vocab-2"), (1, 4))
)
"""Layers and vocabulary layers of different weight, so that neither's constants stand in for the other's."""
START = {
    "matmul_efficiency": 0.6,
    "half_size": 16.0,
    "attention_efficiency": 0.2,
    "layer_traffic": 150.0,
    "logit_traffic": 30.0,
    "edge_traffic": 20.0,
    "weight_traffic": 10.0,
    "launch": 1e-4,
    "intra_bandwidth": 1e9,
    "intra_latency": 1e-4,
}
LONG = 1e-2  # seconds of the passes that the closing line is about
SHORT = 2e-3  # seconds below which the fit compares differences, not ratios: short passes decide little
ROUNDS, STEP_ROUNDS, MINUTES = 3, 9, 20.0
KINDS = ("F", "B", "S", "T", "H", "IB")
SUMS = ("hidden_broadcast", "grad_sum", "transfer")
Say = Callable[[str], None]
Cases = list[tuple[ModelOptions, str, int, dict[str, Any]]]
"""Model, method, microbatch size, and milliseconds of the passes by name."""


def measure(path: Path, say: Say) -> None:
    """Write the description of this machine's cores. Raises ValueError with fewer than two, or on a write error."""
    start = described(_core_flops())
    found = _passes(say)
    gpu = fitted(found, start)
    long = [abs(model / s - 1) for _, s, model in compared(found, gpu) if s >= LONG]
    try:
        path.write_text(as_toml(gpu))
    except OSError as problem:
        raise ValueError(f"measure_cpu is {path}; it cannot be written: {problem.strerror}") from None
    say(f"written to {path}; passes of {1e3 * LONG:.0f} ms or more are off by {np.mean(long):.1%} on average")


def fitted(found: Cases, start: GPU) -> GPU:
    """The constants that fit the measured passes best."""

    def residuals(at: Constants) -> np.ndarray:
        rows = compared(found, dataclasses.replace(start, **at))
        return np.array([np.log((model + SHORT) / (s + SHORT)) for _, s, model in rows])

    return dataclasses.replace(start, **gauss_newton(residuals, START, iterations=30)[0])


def _passes(say: Say) -> Cases:
    """The cases, each with its passes' seconds."""
    left, found = countdown(60 * MINUTES), []
    with Group(speed_stage.STAGE_SCRIPT, 2) as group:
        group.ask("join", left(), coordinator=f"127.0.0.1:{free_port()}", ranks=2)
        for n, (model, method, size) in enumerate(CASES):
            pipeline = PipelineOptions(method=method, stages=2, microbatches=4, microbatch_size=size)
            group.ask("prepare", left(), name=str(n), **speed_stage.request(model, pipeline, "cpu"))
            group.ask("prepare_passes", left(), name=str(n))
            for _ in range(ROUNDS):
                group.ask("time_passes", left())
            found.append((model, method, size, group.ask("predict", left(), name=str(n))[0]["pass_ms"]))
            group.ask("forget_passes", left())
            say(f"{n + 1} of {len(CASES)}: passes of h={model.hidden}, {method}, microbatches of {size}")
    return found


def compared(found: Cases, gpu: GPU) -> list[tuple[str, float, float]]:
    """Name, measured and modeled seconds of every pass that takes time."""
    rows = []
    for model, method, size, ms in found:
        schedule = build_schedule("1f1b", method, p=2, m=1, overlap=False)
        modelled = Cost(models.cost_sizes(model.config(), size), gpu).durations(schedule)
        names = KINDS + (SUMS if schedule.sharded else ("transfer",))
        for name in names:
            measured = 1e-3 * _largest(ms[name])
            if measured > 0:
                rows.append((f"{method} of {size}: {name}", measured, _largest(getattr(modelled, name))))
    return rows


def _largest(times: Any) -> float:
    return float(np.max(np.asarray(times, float)))


def described(peak_flops: float) -> GPU:
    """The machine before its constants are fitted; a core's peak is its measured matrix-product rate."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
    cores = len(os.sched_getaffinity(0))
    sheet = {"peak_flops": peak_flops, "memory_bytes": memory, "memory_bandwidth": 1e10, "gpus_per_node": cores}
    none = {"contention": 0.0, "overhead": 0.0, "inter_bandwidth": 1e9, "inter_latency": 1e-3}
    fixed = sheet | none | {"traffic_efficiency": 1.0}
    return GPU(name="CPU", overlaps=False, **(fixed | START))


def _core_flops(n: int = 1024) -> float:
    """FLOP/s of one core in a large float32 product."""
    x = jnp.ones((n, n), jnp.float32)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(x, x))
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready(product(x, x))
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best / len(os.sched_getaffinity(0))


def as_toml(gpu: GPU) -> str:
    """The file that :func:`~vocabpp_jax.schedules.simulation.cost.load_gpu` reads."""
    values = {f.name: getattr(gpu, f.name) for f in dataclasses.fields(gpu) if f.name != "target"}
    written = {bool: lambda v: str(v).lower(), str: lambda v: f'"{v}"', int: str, float: lambda v: f"{v:.4g}"}
    lines = [f"{name} = {written[type(value)](value)}" for name, value in values.items()]
    return "\n".join(["# This machine's cores, written by experiments/plan.py --measure-cpu.", *lines, ""])


# --- plans, timed ----------------------------------------------------------------------------------------------------


def timed(plans: Sequence[Plan], run_of: Callable, rounds: int = STEP_ROUNDS) -> list[Timed]:
    """Time a step of every plan, loss and gradients, in turns on this machine's cores."""
    left = countdown(60 * MINUTES)
    stages = plans[0].choice.stages
    with Group(speed_stage.STAGE_SCRIPT, stages) as group:
        group.ask("join", left(), coordinator=f"127.0.0.1:{free_port()}", ranks=stages)
        for n, plan in enumerate(plans):
            model, pipeline = run_of(plan.choice)
            group.ask("prepare", left(), name=str(n), **speed_stage.request(model, pipeline, "cpu"))
        times = in_turns({str(n): (group, str(n)) for n in range(len(plans))}, rounds, left)
    return [Timed(plan, times[str(n)].seconds) for n, plan in enumerate(plans)]
