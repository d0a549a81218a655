"""The cost of multi-token prediction by vocabulary method, and its benefit: simulated, measured, trained.

    python experiments/mtp.py                     all three; simulated takes minutes
    python experiments/mtp.py --only trained      only one of them

The tail replaces as many layers as it has depths: a model of L layers is compared with one of L - D layers and D
depths, so that the number of layers per stage stays the same. Tables go to the page that --docs names.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

import simulate
import speed
from command_line.options import ModelOptions, PipelineOptions
from command_line.parsing import fail, or_fail, parse
from reports.markdown import insert_table, table
from speed_measure import speed_stage
from speed_measure.processes import Group, GroupFailed
from speed_measure.turns import countdown, in_turns, ratio
from vocabpp_jax import models
from vocabpp_jax.schedules import Schedule
from vocabpp_jax.schedules.simulation.cost import Sizes, stage_layers

METHODS = ("baseline", "redis", "vocab-1", "vocab-2")
SETTINGS = {"4B": 8, "21B": 32}
"""Published models, and their stages."""
VOCABULARIES = (32_000, 128_000, 256_000)
DEPTHS = (0, 1, 2)


@dataclass(frozen=True)
class MtpOptions:
    """What to compare, and where the result goes."""

    only: tuple[str, ...] = ()
    """simulated, measured, trained, or several of them; default all."""
    docs: str = "docs/mtp.md"
    """The page whose tables are replaced."""
    microbatches: int = 128
    """Simulated microbatches."""
    rounds: int = 7
    """Measured: rounds in which every pipeline runs one step; fewer if time runs out."""
    minutes: float = 20.0
    """Measured: time limit in minutes."""
    steps: int = 300
    """Trained: steps of each of the two runs."""
    output: str = "runs/mtp"
    """Trained: folder for the two runs; must not hold any yet."""
    model: ModelOptions = field(
        default_factory=lambda: ModelOptions(model="gpt-mini", layers=4, hidden=512, seq=256, vocab_size=8192)
    )
    """Measured: the model without a tail."""


def device_flops(z: Sizes, schedule: Schedule) -> float:
    """FLOPs of one microbatch on the busiest device."""
    of_stage = np.array(stage_layers(schedule, z.layers, z.depths)) * z.layer_flops
    of_stage[-1] += z.depths * z.depth_flops
    flops = np.zeros(schedule.p)
    np.add.at(flops, list(schedule.placement), of_stage)
    head = z.streams * z.head_flops
    if schedule.sharded:
        return float((flops + head / schedule.p).max())
    flops[schedule.placement[-1]] += head
    return float(flops.max())


def simulated(options: MtpOptions) -> list[dict[str, Any]]:
    """One line per model, vocabulary size and method."""
    lines = []
    for name, stages in SETTINGS.items():
        for V in VOCABULARIES:
            for method in METHODS:
                found = [iteration(options, name, stages, V, method, depths) for depths in DEPTHS]
                line = {"model": name, "stages": stages, "V": V, "method": method, "ms": found[0][0]}
                for depths, (ms, flops) in zip(DEPTHS[1:], found[1:], strict=True):
                    line[f"D={depths}"], line[f"by FLOPs, {depths}"] = ms / found[0][0] - 1, flops / found[0][1] - 1
                lines.append(line)
                print(line, file=sys.stderr)
    return lines


def iteration(options: MtpOptions, name: str, stages: int, V: int, method: str, depths: int) -> tuple[float, float]:
    """Milliseconds of an iteration, and the FLOPs of the busiest device."""
    of = simulate.SimulateOptions(
        model=name,
        layers=models.named(name).layers - depths,
        vocab_size=V,
        stages=stages,
        microbatches=options.microbatches,
        mtp_depth=depths,
    )
    done = simulate.run(of, "1f1b", method)
    return done.ms, device_flops(done.cost.sizes, done.timeline.schedule)


def measured(options: MtpOptions) -> list[dict[str, Any]]:
    """Step times of two processes with a core each, per method: without and with one further token, in turns."""
    cases = {
        (method, depths): _case(options, method, depths) for method in ("baseline", "vocab-2") for depths in (0, 1)
    }
    left = countdown(60 * options.minutes)
    with Group(speed_stage.STAGE_SCRIPT, 2) as group:
        platform = speed.join(group, left())["platform"]
        for name, (model, pipeline, _) in cases.items():
            group.ask("prepare", left(), name=str(name), **speed_stage.request(model, pipeline, platform))
        times = in_turns({str(name): (group, str(name)) for name in cases}, options.rounds, left)
    lines = []
    for method in ("baseline", "vocab-2"):
        before, after = (times[str((method, depths))].seconds for depths in (0, 1))
        line = {"method": method, "ms": 1e3 * statistics.median(before), "ms, D=1": 1e3 * statistics.median(after)}
        explained = cases[method, 1][2] / cases[method, 0][2] - 1
        lines.append(line | {"D=1": ratio(after, before) - 1, "by FLOPs": explained})
    return lines


def _case(options: MtpOptions, method: str, depths: int) -> tuple[ModelOptions, PipelineOptions, float]:
    """What to build, and the FLOPs of its busiest device."""
    model = dataclasses.replace(options.model, layers=options.model.config().layers - depths, mtp_depth=depths)
    pipeline = PipelineOptions(method=method, stages=2, microbatches=16, microbatch_size=1)
    config = model.config()
    return model, pipeline, device_flops(models.cost_sizes(config, 1, depths), pipeline.build(config))


def trained(options: MtpOptions) -> list[dict[str, Any]]:
    """Two runs on the default text that differ only in the tail: their final losses."""
    lines = []
    for depths in (0, 1):
        folder = Path(options.output) / f"depth-{depths}"
        script = Path(__file__).with_name("train.py")
        given = {
            "model": "gpt-tiny", "vocab-size": 512, "stages": 2, "data-parallel": 1, "microbatches": 4,
            "microbatch-size": 4, "steps": options.steps, "mtp-depth": depths, "output": folder,
        }  # fmt: skip
        flags = [x for name, value in given.items() for x in (f"--{name}", str(value))]
        if subprocess.run([sys.executable, str(script), *flags, "--no-overlap"], check=False).returncode:
            fail(f"the training run to {folder} has failed", status=1)
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        entropy = json.loads((folder / "config.json").read_text())["corpus"]["unigram_entropy"]
        lines.append(
            {
                "D": depths,
                "validation loss": last["validation_loss"],
                "of the token after the next": last.get("validation_loss_depth_1"),
                "unigram entropy": entropy,
            }
        )
    return lines


SECTIONS: dict[str, tuple[Callable[[MtpOptions], list[dict[str, Any]]], dict[str, str]]] = {
    "simulated": (
        simulated,
        {"ms": ".0f", "V": "d", "stages": "d"}
        | {name: "+.1%" for d in DEPTHS[1:] for name in (f"D={d}", f"by FLOPs, {d}")},
    ),
    "measured": (measured, {"ms": ".0f", "ms, D=1": ".0f", "D=1": "+.1%", "by FLOPs": "+.1%"}),
    "trained": (trained, {"D": "d"} | dict.fromkeys(("validation loss", "of the token after the next"), ".3f")),
}


def chosen(options: MtpOptions) -> Iterator[str]:
    """The sections to run. Raises ValueError for an unknown one."""
    for name in options.only or SECTIONS:
        if name not in SECTIONS:
            raise ValueError(f"only has {name!r}; the sections are {', '.join(SECTIONS)}")
        yield name


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    options = or_fail(lambda: parse(MtpOptions, __doc__, arguments))
    names = or_fail(lambda: list(chosen(options)))
    for name in names:
        make, formats = SECTIONS[name]
        try:
            text = table(or_fail(lambda make=make: make(options)), formats)
        except GroupFailed as problem:
            fail(str(problem), status=1)
        print(text)
        or_fail(lambda name=name, text=text: insert_table(Path(options.docs), f"mtp-{name}", text))


if __name__ == "__main__":
    main()
