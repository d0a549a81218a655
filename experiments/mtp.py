"""What predicting further tokens costs, by vocabulary method, and what it gives: simulated, measured, trained.

    python experiments/mtp.py                     all three; simulated takes minutes
    python experiments/mtp.py --only trained      one of them again

The tail takes the place of as many layers as it has depths: a model of L layers is compared with one of L - D layers
and D depths, so that every stage has as many layers as before. Tables go to the page that --docs names.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

import simulate
from command_line.options import ClusterOptions, ModelOptions, PipelineOptions, fail, or_fail, parse
from reports.markdown import insert_table, table
from vocabpp_jax import Pipeline, make_mesh, models
from vocabpp_jax.pipeline.mesh import all_devices
from vocabpp_jax.schedules import Schedule
from vocabpp_jax.schedules.simulation.cost import Sizes, stage_layers

METHODS = ("baseline", "redis", "vocab-1", "vocab-2")
SETTINGS = {"4B": 8, "21B": 32}
"""Published models, and their stages."""
VOCABULARIES = (32_000, 128_000, 256_000)
DEPTHS = (0, 1, 2)


@dataclass(frozen=True)
class MtpOptions:
    """What is compared, and where it goes."""

    only: tuple[str, ...] = ()
    """simulated, measured, trained, or several of them; all if not given."""
    docs: str = "docs/mtp.md"
    """The page whose tables are replaced."""
    microbatches: int = 128
    """Simulated microbatches."""
    rounds: int = 15
    """Measured: rounds in which every pipeline makes one step."""
    steps: int = 300
    """Trained: steps of each of the two runs."""
    output: str = "runs/mtp"
    """Trained: folder for the two runs, which must not hold any yet."""
    model: ModelOptions = field(
        default_factory=lambda: ModelOptions(model="gpt-mini", layers=4, hidden=256, seq=128, vocab_size=8192)
    )
    """Measured: the model without a tail."""


def device_flops(z: Sizes, schedule: Schedule) -> float:
    """FLOPs of one microbatch on the device that has the most."""
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
    """A line for every model, vocabulary and method."""
    lines = []
    for name, stages in SETTINGS.items():
        for V in VOCABULARIES:
            for method in METHODS:
                found = [_iteration(options, name, stages, V, method, depths) for depths in DEPTHS]
                line = {"model": name, "stages": stages, "V": V, "method": method, "ms": found[0][0]}
                for depths, (ms, flops) in zip(DEPTHS[1:], found[1:], strict=True):
                    line[f"D={depths}"], line[f"by FLOPs, {depths}"] = ms / found[0][0] - 1, flops / found[0][1] - 1
                lines.append(line)
                print(line, file=sys.stderr)
    return lines


def _iteration(options: MtpOptions, name: str, stages: int, V: int, method: str, depths: int) -> tuple[float, float]:
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
    """The step on two simulated devices, a line a method: median milliseconds without and with one further token."""
    runs = {(method, depths): _step(options, method, depths) for method in ("baseline", "vocab-2") for depths in (0, 1)}
    times: dict[Any, list[float]] = {key: [] for key in runs}
    for _ in range(options.rounds):
        for key, (step, _) in runs.items():
            began = time.perf_counter()
            step()
            times[key].append(time.perf_counter() - began)
    lines = []
    for method in ("baseline", "vocab-2"):
        # Of each round, so that what slows the machine slows both.
        ratio = statistics.median(b / a for a, b in zip(times[method, 0], times[method, 1], strict=True))
        before, after = (1e3 * statistics.median(times[method, depths]) for depths in (0, 1))
        explained = runs[method, 1][1] / runs[method, 0][1] - 1
        lines.append({"method": method, "ms": before, "ms, D=1": after, "D=1": ratio - 1, "by FLOPs": explained})
    return lines


def _step(options: MtpOptions, method: str, depths: int) -> tuple[Callable[[], Any], float]:
    """A compiled loss and gradient, and the FLOPs of all devices, which share the cores."""
    config = options.model.config()
    model = dataclasses.replace(options.model, layers=config.layers - depths, mtp_depth=depths)
    laid = PipelineOptions(method=method, stages=2, microbatches=8, microbatch_size=1, no_overlap=True)
    config, built = model.config(), model.build()
    pipe = Pipeline(built, laid.build(config, mtp_depth=depths), make_mesh(2, 1, all_devices()[:2]))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (8, 1, config.seq), dtype=np.int32)
    params, batch = pipe.init(jax.random.key(0)), {"tokens": tokens, "labels": tokens}
    run = pipe.jit(pipe.value_and_grad).lower(params, batch).compile()
    flops = device_flops(models.cost_sizes(config, 1, depths), pipe.schedule)
    return lambda: jax.block_until_ready(run(params, batch)), flops


def trained(options: MtpOptions) -> list[dict[str, Any]]:
    """Two runs on the default text that differ in the tail alone: the losses at their end."""
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
    ClusterOptions().join(2)
    for name in names:
        make, formats = SECTIONS[name]
        text = table(or_fail(lambda make=make: make(options)), formats)
        print(text)
        or_fail(lambda name=name, text=text: insert_table(Path(options.docs), f"mtp-{name}", text))


if __name__ == "__main__":
    main()
