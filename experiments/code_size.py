"""Compile every schedule for simulated devices and tabulate compile time, instructions and scans.

The schedules are those of the 4B model on A100s. What is compiled is a minimal model, one layer per stage, so the
numbers are the schedule's own code. Instructions are counted for two numbers of microbatches, both large enough for a
steady state.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console

from command_line.options import ClusterOptions
from command_line.parsing import OptionalStr, or_fail, parse
from vocabpp_jax import Pipeline, make_mesh, models, schedules
from vocabpp_jax.pipeline.mesh import all_devices
from vocabpp_jax.schedules.simulation.cost import Cost, load_gpu


@dataclass(frozen=True)
class CodeSizeOptions:
    """What to compile, and where the table goes."""

    stages: tuple[int, ...] = (2, 4, 8)
    """Numbers of devices."""
    methods: tuple[str, ...] = ("baseline", "vocab-2")
    """Vocabulary methods."""
    output: OptionalStr = None
    """Markdown file for the table; printed by default."""


def measure(schedule: str, method: str, p: int, m: int) -> tuple[int, int, float]:
    """Number of scans, number of compiled instructions, and seconds spent tracing, lowering and compiling."""
    durations = Cost(models.cost_sizes(models.named("4B")), load_gpu("a100-80g")).durations
    built = schedules.build(schedule, method, p=p, m=m, durations=durations)
    config = models.named("gpt-tiny", layers=built.stages, hidden=16, heads=2, seq=8, vocab_size=64)
    pipe = Pipeline(models.build(config), built, make_mesh(p, devices=all_devices()[:p]))
    tokens = jax.ShapeDtypeStruct((m, 1, 8), jnp.int32)
    started = time.monotonic()
    compiled = pipe.jit(pipe.value_and_grad).lower(pipe.layout.shapes(), {"tokens": tokens, "labels": tokens}).compile()
    seconds = time.monotonic() - started
    return len(pipe.program.segments), compiled.as_text().count(" = "), seconds


def main() -> None:
    options = parse(CodeSizeOptions, __doc__)
    or_fail(lambda: ClusterOptions().join(max(options.stages)))
    console = Console(stderr=True)
    lines = [
        "| schedule | method | devices | scans | instructions, m = 8p | m = 32p | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for schedule in schedules.SCHEDULES:
        for method in options.methods:
            for p in options.stages:
                scans, few, seconds = measure(schedule, method, p, 8 * p)
                _, many, _ = measure(schedule, method, p, 32 * p)
                lines.append(f"| {schedule} | {method} | {p} | {scans} | {few} | {many} | {seconds:.1f} |")
                console.print(lines[-1])
                jax.clear_caches()
    table = "\n".join(lines)
    if options.output is None:
        print(table)
    else:
        Path(options.output).write_text(
            "# Compile time and code size\n\n"
            "Compiled for simulated CPU devices, one layer per stage, by `python experiments/code_size.py "
            "--output docs/code-size.md`.\nThe schedules are fitted to the pass times of 4B on A100s. Seconds "
            "cover tracing, lowering and compiling, on a\nshared machine: compare them only with each other.\n\n"
            f"{table}\n"
        )


if __name__ == "__main__":
    main()
