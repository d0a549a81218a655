"""PyTorch's pipelines and ours side by side: losses step by step, and throughput.

    python experiments/compare_pytorch.py --what losses
    python experiments/compare_pytorch.py --what speed --docs docs/speed.md
    python experiments/compare_pytorch.py --what logs --logs megatron.log

Both sides start from the same weights and train on the same batches, one process per stage, each with its own core or
GPU. ``losses`` trains with Adam on both sides and compares the losses of every step; it exits with status 1 if they
differ by more than the tolerance. ``speed`` times them in turns, and also the last stage alone in a plain accumulation
step of each framework on one device, which gives the kernel ratio. The schedule ratio is that of our own pipelines.
``logs`` puts runs of Megatron-LM or VocabularyParallelism into the same table; --logs also works with the other modes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import jax
import numpy as np

from command_line.options import ModelOptions, PipelineOptions
from command_line.parsing import OptionalStr, or_fail, parse, write_json
from comparators import EVEN_SHARE
from pytorch.compare_report import ALONE, losses_table, ratios_of, speed_table
from pytorch.megatron_logs import read_log
from reports.markdown import insert_table
from speed_measure import exchange
from speed_measure.processes import Group, GroupFailed, free_port
from speed_measure.speed_stage import STAGE_SCRIPT, name_of, request
from speed_measure.turns import Left, countdown, in_turns, say
from vocabpp_jax import models
from vocabpp_jax.models.gpt import GPTConfig
from vocabpp_jax.schedules.layers import even_split


@dataclass(frozen=True)
class CompareOptions:
    """What to compare, for how long, and where the result goes."""

    what: Literal["losses", "speed", "logs"] = "losses"
    """Losses step by step, throughput, or only the logs of other runs."""
    schedules: tuple[str, ...] = ("1f1b",)
    """PyTorch's schedules: 1f1b, gpipe, interleaved-1f1b, v-zb."""
    ours: tuple[str, ...] = ("1f1b vocab-2", "1f1b baseline")
    """Our pipelines, schedule and method in one string each."""
    vocab_sizes: tuple[int, ...] = (8192, 32768)
    """With speed: vocabulary sizes. Losses use the model's own."""
    steps: int = 50
    """With losses: optimizer steps."""
    lr: float = 1e-3
    """With losses: the learning rate."""
    tolerance: float = 1e-4
    """With losses: the largest allowed difference, in nats per token."""
    repeats: int = 4
    """With speed: rounds, each timing everything once."""
    minutes: float = 20.0
    """Time limit for the whole run, in minutes."""
    logs: tuple[str, ...] = ()
    """Logs of Megatron-LM or VocabularyParallelism."""
    json: OptionalStr = None
    """File for the result as JSON, - for standard output."""
    docs: OptionalStr = None
    """Markdown page whose table of this comparison is replaced."""
    folder: OptionalStr = None
    """Keep the weights and batches here, for pytorch_baseline.py; by default they are deleted at the end."""
    gpus: bool = False
    """Give each stage a GPU of this machine instead of a core."""
    share_cores: bool = False
    """Continue even if there are fewer cores than stages. Such times are meaningless."""
    model: ModelOptions = field(
        default_factory=lambda: ModelOptions(model="gpt-mini", layers=4, hidden=768, heads=12, seq=512)
    )
    pipeline: PipelineOptions = field(
        default_factory=lambda: PipelineOptions(stages=2, microbatches=12, microbatch_size=1)
    )

    def __post_init__(self) -> None:
        for name in ("steps", "lr", "repeats", "minutes", "tolerance"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in self.ours:
            if len(name.split()) != 2:
                raise ValueError(f'ours has {name!r}; write schedule and method, for example "1f1b vocab-2"')
        self.model.refuse_other_losses()
        if self.model.config().tie_embeddings:
            raise ValueError("tie_embeddings is set; torch.distributed.pipelining cannot tie two stages' weights")
        if not isinstance(self.model.config(), GPTConfig):
            raise ValueError(f"model is {self.model.model!r}; the PyTorch side only has a GPT, so choose one")
        if self.model.config().dtype != "float32":
            raise ValueError(f"dtype is {self.model.dtype!r}; the two are compared in float32")


@dataclass(frozen=True)
class Both:
    """The two groups and what they run; both end when the time is up."""

    options: CompareOptions
    ours: Group
    theirs: Group
    left: Left
    devices: dict[str, Any]

    @property
    def platform(self) -> str:
        """The platform it runs on."""
        return "gpu" if self.options.gpus else "cpu"

    def arguments(self, vocab_size: int, schedule: str, method: str) -> dict[str, Any]:
        """Arguments for our ranks."""
        model = dataclasses.replace(self.options.model, vocab_size=vocab_size)
        return request(model, self.options.pipeline, self.platform, schedule=schedule, method=method)

    def last_stage(self, vocab_size: int, p: int) -> dict[str, Any]:
        """Arguments for one of our ranks to build the last of p stages: a model of its layers alone. The embedding
        costs next to nothing, since only rows that are looked up get a gradient."""
        layers = even_split(self.options.model.config().layers, p)[-1]
        model = dataclasses.replace(self.options.model, vocab_size=vocab_size, layers=layers)
        return request(model, self.options.pipeline, self.platform, stages=1)

    def torch_arguments(self, vocab_size: int, schedule: str, folder: str) -> dict[str, Any]:
        """Arguments for PyTorch's ranks."""
        config = self.options.model.config()
        shape = {"layers": config.layers, "hidden": config.hidden, "heads": config.heads, "vocab_size": vocab_size}
        return {
            "schedule": schedule,
            "shape": shape,
            "folder": folder,
            "microbatches": self.options.pipeline.microbatches,
        }


@contextlib.contextmanager
def both(options: CompareOptions, left: Left, p: int) -> Iterator[Both]:
    """A group of p devices for each framework. One waits while the other computes."""
    with contextlib.ExitStack() as stack:
        groups, devices = [], {}
        for script in (Path(__file__).with_name("pytorch_baseline.py"), STAGE_SCRIPT):
            group = stack.enter_context(Group(script, p, options.gpus, options.share_cores))
            devices |= group.ask("join", left(), coordinator=f"127.0.0.1:{free_port()}", ranks=p)[0]
            groups.insert(0, group)
        yield Both(options, *groups, left, devices)


def folder_of(options: CompareOptions) -> contextlib.AbstractContextManager[str]:
    """The folder for weights and batches."""
    return contextlib.nullcontext(options.folder) if options.folder else tempfile.TemporaryDirectory()


def export(options: CompareOptions, vocab_size: int, steps: int, folder: Path) -> None:
    """Write initial weights and batches for both."""
    config = dataclasses.replace(options.model.config(), vocab_size=vocab_size)
    weights = jax.jit(models.build(config).init)(jax.random.key(0))
    named = {name_of(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(weights)}
    pipeline = options.pipeline
    batches = exchange.make_batches(
        steps, pipeline.microbatches, pipeline.microbatch_size, config.seq, config.vocab_size
    )
    exchange.write(folder, named, batches)


def compare_losses(options: CompareOptions, left: Left) -> dict[str, Any]:
    """Every run's losses, and the largest difference from the first of ours."""
    vocab_size = options.model.config().vocab_size
    with folder_of(options) as folder, both(options, left, options.pipeline.stages) as groups:
        export(options, vocab_size, options.steps, Path(folder))
        losses, train = {}, {"lr": options.lr, "steps": options.steps}
        for name in options.ours:
            arguments = groups.arguments(vocab_size, *name.split())
            losses[f"ours {name}"] = groups.ours.ask("losses", left(), folder=folder, **arguments, **train)[0]
            say(f"ours {name}: {losses[f'ours {name}'][-1]:.6f} after {options.steps} steps")
        for name in options.schedules:
            arguments = groups.torch_arguments(vocab_size, name, folder)
            losses[f"torch {name}"] = groups.theirs.ask("losses", left(), **arguments, **train)[0]
            say(f"torch {name}: {losses[f'torch {name}'][-1]:.6f} after {options.steps} steps")
    first = np.array(losses[f"ours {options.ours[0]}"])
    difference = {name: float(np.max(np.abs(np.array(of) - first))) for name, of in losses.items()}
    return {"losses": losses, "largest_difference": difference, "holds": max(difference.values()) <= options.tolerance}


def compare_speed(options: CompareOptions, left: Left) -> dict[str, Any]:
    """Rows of every contender at every vocabulary size, the ratios, and the hardware."""
    result: dict[str, Any] = {"rows": [], "ratios": [], "devices": {}}
    tokens = options.pipeline.microbatches * options.pipeline.microbatch_size * options.model.config().seq
    for number, vocab_size in enumerate(options.vocab_sizes):
        part = countdown(left() / (len(options.vocab_sizes) - number))
        result["devices"], seconds = time_all(options, vocab_size, part)
        for name, of in seconds.items():
            framework, _, rest = name.partition(" ")
            result["rows"].append(
                {
                    "framework": framework,
                    "what": rest,
                    "vocab_size": vocab_size,
                    "measured_ms": 1e3 * median(of),
                    "least_ms": 1e3 * min(of),
                    "most_ms": 1e3 * max(of),
                    "repeats": len(of),
                    "tokens_per_second": tokens / median(of),
                }
            )
        result["ratios"] += ratios_of(options.ours, vocab_size, seconds)
    return result


def time_all(options: CompareOptions, vocab_size: int, left: Left) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """The hardware, and seconds of every step of both frameworks, in turns, for one vocabulary size."""
    with contextlib.ExitStack() as stack:
        folder, p = stack.enter_context(folder_of(options)), options.pipeline.stages
        alone, groups = stack.enter_context(both(options, left, 1)), stack.enter_context(both(options, left, p))
        export(options, vocab_size, 1, Path(folder))
        asked: dict[str, tuple[Group, str]] = {}

        def prepare(framework: str, of: Group, name: str, **arguments: Any) -> None:
            of.ask("prepare", left(), name=name, **arguments)
            asked[f"{framework} {name}"] = of, name

        prepare("ours", alone.ours, ALONE, comparator=EVEN_SHARE, **alone.last_stage(vocab_size, p))
        prepare("torch", alone.theirs, ALONE, stages=p, **alone.torch_arguments(vocab_size, EVEN_SHARE, folder))
        for name in options.ours:
            prepare("ours", groups.ours, name, **groups.arguments(vocab_size, *name.split()))
        for name in options.schedules:
            prepare("torch", groups.theirs, name, **groups.torch_arguments(vocab_size, name, folder))
        times = in_turns(asked, options.repeats, left, f"V={vocab_size}: ")
        return groups.devices, {name: of.seconds for name, of in times.items()}


def measured_on(options: CompareOptions, result: dict[str, Any]) -> str:
    """A line that says what was timed, and on what."""
    config, devices = options.model.config(), result["devices"]
    if not devices:
        return "From the logs of other runs."
    return (
        f"{devices['devices']} × {devices['device']}, one process each, jax {devices['jax']}, torch {devices['torch']} "
        f"(eager); {config.layers} layers, h={config.hidden}, s={config.seq}, "
        f"m={options.pipeline.microbatches}, loss and gradients. Measured: medians of "
        f"{min(row['repeats'] for row in result['rows'])} rounds; ratios are medians of the rounds' own."
    )


def main(arguments: list[str] | None = None) -> None:
    options = or_fail(lambda: parse(CompareOptions, __doc__, arguments))
    runs = or_fail(lambda: [read_log(path) for path in options.logs])
    jax.config.update("jax_platforms", "cpu")  # this process only exports; the devices belong to the ranks
    say(f"{options.what}: at most {options.minutes:g} minutes")
    if options.gpus:  # where PyTorch multiplies in float32 unless told otherwise
        os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    left = countdown(60 * options.minutes)
    result: dict[str, Any] = {
        "rows": [],
        "ratios": [],
        "devices": {},
        "logs": [dataclasses.asdict(run) for run in runs],
    }
    try:
        if options.what == "losses":
            result |= or_fail(lambda: compare_losses(options, left))
        elif options.what == "speed":
            result |= or_fail(lambda: compare_speed(options, left))
    except GroupFailed as problem:
        say(f"error: {problem}")
        raise SystemExit(1) from None
    tables = [losses_table(result)] if "losses" in result else []
    if result["rows"] or runs:
        tables.append(speed_table(measured_on(options, result), result["rows"], result["ratios"], runs))
    print("\n".join(tables), file=sys.stderr if options.json == "-" else sys.stdout)
    write_json(options.json, result)
    if options.docs:
        or_fail(lambda: insert_table(Path(options.docs), f"pytorch-{options.what}", "\n".join(tables)))
    if not result.get("holds", True):
        say(f"the losses differ by more than {options.tolerance:g}")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
