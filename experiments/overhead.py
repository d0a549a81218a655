"""The executor's overhead over a plain jitted gradient-accumulation step of the same model on the same core.

    python experiments/overhead.py --docs docs/speed.md

One process on one core simulates 1, 2, 4 and 8 devices. They take turns on the core, so no time is lost in waiting and
a schedule's bubble costs nothing: the extra time over the plain step is the executor's own. All are timed in turns.
With --account, every pass is timed too, and the step's time is broken down by pass.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from command_line.options import ModelOptions, PipelineOptions
from command_line.parsing import OptionalStr, or_fail, parse, write_json
from comparators import EVEN_SHARE
from reports.markdown import insert_table
from speed_measure.processes import Group, GroupFailed
from speed_measure.speed_stage import STAGE_SCRIPT, request
from speed_measure.turns import countdown, in_turns, ratio, say

PLAIN = "plain step"


@dataclass(frozen=True)
class OverheadOptions:
    """What to measure, for how long, and where the result goes."""

    devices: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of simulated devices."""
    methods: tuple[str, ...] = ("vocab-2",)
    """Vocabulary methods, under the pipeline's schedule."""
    repeats: int = 3
    """Rounds, each timing everything once."""
    minutes: float = 8.0
    """Time limit for the whole run, in minutes."""
    account: bool = False
    """Time every pass and break down the step's time."""
    json: OptionalStr = None
    """File for the result as JSON, - for standard output."""
    docs: OptionalStr = None
    """Markdown page whose table of these measurements is replaced."""
    model: ModelOptions = field(
        default_factory=lambda: ModelOptions(model="gpt-mini", layers=8, hidden=512, heads=8, seq=256, vocab_size=8192)
    )
    pipeline: PipelineOptions = field(default_factory=lambda: PipelineOptions(microbatches=16, microbatch_size=1))

    def __post_init__(self) -> None:
        if not self.devices or min(self.devices) < 1:
            raise ValueError(f"devices is {self.devices}; give one number or more, each at least 1")
        self.model.refuse_other_losses()
        if self.pipeline.stages != PipelineOptions.stages or self.pipeline.method != PipelineOptions.method:
            raise ValueError("stages and method are for one pipeline; here they are devices and methods")


def measure(options: OverheadOptions) -> dict[str, Any]:
    """Rows of the plain step and of every pipeline."""
    left = countdown(60 * options.minutes)
    cases = {PLAIN: (1, "vocab-2")} | {f"{m}, p={p}": (p, m) for m in options.methods for p in options.devices}
    rows: dict[str, dict[str, Any]] = {}
    with Group(STAGE_SCRIPT, ranks=1) as group:
        device = group.ask("simulate", left(), devices=max(options.devices))[0]
        for name, (p, method) in cases.items():
            arguments = request(options.model, options.pipeline, "cpu", stages=p, method=method)
            comparator = EVEN_SHARE if name == PLAIN else None
            ready = group.ask("prepare", left(), name=name, comparator=comparator, **arguments)[0]
            rows[name] = {"devices": p, "method": method} | ready
            say(f"{name}: compiled, {left():.0f} s left")
        pipelines = [name for name in cases if name != PLAIN] if options.account else []
        for name in pipelines:
            group.ask("prepare_passes", left(), name=name)
        asked, passes_of = {name: (group, name) for name in cases}, group if pipelines else None
        for name, times in in_turns(asked, options.repeats, left, passes_of=passes_of).items():
            rows[name] |= dataclasses.asdict(times)
        for name in pipelines:
            rows[name]["account_ms"] = group.ask("account", left(), name=name)[0]
    for row in rows.values():
        for name, of in (("overhead", "seconds"), ("cpu_overhead", "cpu_s")):
            row[name] = ratio(row[of], rows[PLAIN][of]) - 1
    return {"device": device, "rows": rows}


def table_of(options: OverheadOptions, result: dict[str, Any]) -> str:
    """Markdown: step times and, if requested, pass times."""
    config, m = options.model.config(), options.pipeline.microbatches
    lines = [
        f"One core ({result['device']['device']}), jax {result['device']['jax']}; {options.pipeline.schedule}, m={m}, "
        f"{config.layers} layers, h={config.hidden}, s={config.seq}, V={config.vocab_size:,}. Measured: medians.",
        "",
        "| | step, ms | over the plain step | in processor time | compile, s |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in result["rows"].items():
        ms = 1e3 * median(row["seconds"])
        lines.append(
            f"| {name} | {ms:.0f} | {row['overhead']:+.1%} | {row['cpu_overhead']:+.1%} | {row['compile_s']:.1f} |"
        )
    for name, row in result["rows"].items():
        if "account_ms" in row:
            parts = row["account_ms"]
            whole = 1e3 * median(row["seconds"])
            told = ", ".join(f"{k} {v:.0f}" for k, v in sorted(parts.items(), key=lambda i: -i[1]) if v >= 0.5)
            lines += ["", f"{name}, ms a step: {told}; together {sum(parts.values()):.0f} of {whole:.0f}."]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    options = or_fail(lambda: parse(OverheadOptions, __doc__, arguments))
    say(f"at most {options.minutes:g} minutes")
    try:
        result = or_fail(lambda: measure(options))
    except GroupFailed as problem:
        print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(1) from None
    table = table_of(options, result)
    print(table, file=sys.stderr if options.json == "-" else sys.stdout)
    write_json(options.json, result)
    if options.docs:
        or_fail(lambda: insert_table(Path(options.docs), "overhead", table))


if __name__ == "__main__":
    main()
