"""Train a GPT on a pipeline of devices whose embedding and LM head are sharded over that same pipeline.

Without arguments it trains on the Python standard library's own sources, on four pipeline devices, which it simulates
where there are only CPUs, and ends within five minutes on two cores.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from options import ClusterOptions, ModelOptions, OptionalInt, OptionalStr, PipelineOptions, or_fail, parse
from vocabpp_jax import Pipeline, models, train
from vocabpp_jax.data import (
    STANDARD_LIBRARY,
    TokenizedCorpus,
    load_tokens,
    training_batches,
    unigram_entropy,
    validation_batches,
)
from vocabpp_jax.metrics import JsonLines, StepProgress, draw_losses
from vocabpp_jax.models import Config
from vocabpp_jax.optimizer import adamw, warmup_cosine


@dataclass(frozen=True)
class TrainOptions:
    """What is trained, on what, for how long."""

    data: str = STANDARD_LIBRARY
    """A text file, a .jsonl file with a field "text" a line, a folder of such files, or stdlib."""
    tokenizer: OptionalStr = None
    """A tokenizer.json to use instead of training one on the data."""
    output: OptionalStr = None
    """Folder for metrics.jsonl, loss.png and config.json. Without it, a new one in runs/."""
    steps: int = 300
    """Optimizer steps."""
    lr: float = 3e-3
    """Peak learning rate; a cosine takes it down to a tenth."""
    warmup: OptionalInt = None
    """Steps in which the learning rate rises to its peak. Without it, a tenth of the steps."""
    weight_decay: float = 0.1
    """Weight decay, on matrices only."""
    clip: float = 1.0
    """The largest norm of the whole gradient; a longer one is shortened to it."""
    eval_every: int = 100
    """Steps between validations. The last step always has one."""
    eval_batches: int = 8
    """Batches in a validation, the same ones each time; fewer if the data has no more."""
    seed: int = 0
    """Decides the initial parameters and the order of the data."""
    model: ModelOptions = field(default_factory=ModelOptions)
    pipeline: PipelineOptions = field(default_factory=PipelineOptions)
    cluster: ClusterOptions = field(default_factory=ClusterOptions)

    @property
    def warmup_steps(self) -> int:
        return self.steps // 10 if self.warmup is None else self.warmup


@dataclass(frozen=True)
class Run:
    """All that training needs, checked, and nothing compiled."""

    options: TrainOptions
    config: Config
    pipe: Pipeline
    optimizer: Any
    tokens: TokenizedCorpus
    batches: Any
    validation: Any
    output: Path

    @property
    def tokens_per_step(self) -> int:
        return int(np.prod(self.batches[0]["tokens"].shape))


def prepare(options: TrainOptions) -> Run:
    """Check everything, cheap things first, and make the data. Raises ValueError where training could not begin."""
    pipeline = options.pipeline
    for name in ("steps", "eval_every", "eval_batches"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} is {getattr(options, name)}; it must be at least 1")
    for name in ("lr", "clip"):
        if not getattr(options, name) > 0:
            raise ValueError(f"{name} is {getattr(options, name)}; it must be above 0")
    if options.seed < 0:
        raise ValueError(f"seed is {options.seed}; it must not be negative")
    config = options.model.config()
    schedule = options.pipeline.build(config)
    options.cluster.join(simulated_devices=pipeline.devices)
    mesh = pipeline.mesh()
    pipe = Pipeline(options.model.build(), schedule, mesh, compute_dtype=config.dtype)
    optimizer = adamw(
        options.lr,
        options.steps,
        options.warmup_steps,
        weight_decay=options.weight_decay,
        decay_mask=lambda _: pipe.layout.matrices(),
    )
    output = output_folder(options)

    if jax.process_index() == 0:
        print(f"reading {options.data}, with a byte-level BPE of {config.vocab_size} tokens", flush=True)
        tokens = load_tokens(options.data, vocab_size=config.vocab_size, tokenizer=options.tokenizer)
    if jax.process_count() > 1:  # the others find what process 0 has put into the cache, or make it on their disk
        multihost_utils.sync_global_devices("tokenised")
        tokens = load_tokens(options.data, vocab_size=config.vocab_size, tokenizer=options.tokenizer)
    shape = {
        "microbatches": pipeline.microbatches,
        "batch": pipeline.microbatch_size * mesh.shape["data"],
        "seq": config.seq,
    }
    batches = training_batches(tokens.train, **shape, seed=options.seed)
    validation = validation_batches(tokens.validation, **shape, at_most=options.eval_batches)
    if jax.process_index() == 0:
        make_folder(output)
    return Run(options, config, pipe, optimizer, tokens, batches, validation, output)


def output_folder(options: TrainOptions) -> Path:
    """The folder that the run is to write to. A run that is there already is left as it is."""
    pipeline = options.pipeline
    name = f"{options.model.model}-{pipeline.schedule}-{pipeline.method}-p{pipeline.stages}"
    output = Path(options.output or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    for file in ("config.json", "metrics.jsonl"):
        if jax.process_index() == 0 and (output / file).exists():
            raise ValueError(f"output is {str(output)!r}, which holds a run already; give another folder or remove it")
    return output


def make_folder(output: Path) -> None:
    """Make it, and see that files can be made in it."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "metrics.jsonl").touch()
    except OSError as reason:
        raise ValueError(f"output is {str(output)!r}, which cannot be written ({reason.strerror})") from None


def place(pipe: Pipeline, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """A batch that every process has, as global arrays of which every process holds its part."""
    sharding = NamedSharding(pipe.mesh, PartitionSpec(None, "data"))
    return {
        name: jax.make_array_from_callback(array.shape, sharding, lambda index, array=array: array[index])
        for name, array in batch.items()
    }


def run_training(run: Run) -> None:
    """Train, telling how it goes; process 0 writes what comes of it."""
    options, writes = run.options, jax.process_index() == 0
    step = train.make_step(run.pipe, run.optimizer, clip=options.clip)
    evaluate = train.make_evaluation(run.pipe)
    rates = jax.vmap(warmup_cosine(options.lr, options.steps, options.warmup_steps, options.lr / 10))(
        np.arange(options.steps)
    ).tolist()
    entropy = unigram_entropy(run.tokens.validation)
    state = train.init_state(run.pipe, run.optimizer, jax.random.key(options.seed))
    losses, validations = [], []
    if writes:
        describe(run)
    lines = JsonLines(run.output / "metrics.jsonl") if writes else None

    with StepProgress(options.steps, run.tokens_per_step, silent=not writes) as progress:
        for k in range(options.steps):
            state, measured = step(state, place(run.pipe, run.batches[k]))
            losses.append((k + 1, float(measured["loss"])))
            progress.step(*losses[-1])
            record = {
                "step": k + 1,
                "loss": losses[-1][1],
                "grad_norm": measured["grad_norm"],
                "learning_rate": rates[k],
                "tokens_per_second": progress.tokens_per_second(k + 1),
            }
            if (k + 1) % options.eval_every == 0 or k + 1 == options.steps:
                jax.block_until_ready(state)  # one program with collectives at a time on devices that share threads
                with progress.paused():
                    validations.append((k + 1, validation_loss(run, evaluate, state.params)))
                record["validation_loss"] = validations[-1][1]
                progress.say(f"step {k + 1}/{options.steps}  validation loss {validations[-1][1]:.4f}")
            if lines:
                lines.write(**record)
    if lines:
        lines.close()
        draw_losses(run.output / "loss.png", losses, validations, entropy)
        recent = np.mean([loss for _, loss in losses[-20:]])
        print(
            f"train loss {recent:.4f}, validation loss {validations[-1][1]:.4f}; a model that knows only how frequent "
            f"every token is\nreaches the unigram entropy, {entropy:.4f} (all in nats a token)\n"
            f"written to {run.output}: metrics.jsonl, loss.png, config.json"
        )


def validation_loss(run: Run, evaluate: Any, params: Any) -> float:
    """Mean loss over all tokens of the validation batches, of which the last may be partly masked."""
    batches = [run.validation[i] for i in range(len(run.validation))]
    sums = [float(evaluate(params, place(run.pipe, batch))) * batch["mask"].sum() for batch in batches]
    return float(sum(sums) / sum(batch["mask"].sum() for batch in batches))


def describe(run: Run) -> None:
    """Write config.json, all that decides the run, and say what is about to happen."""
    device, layout = jax.devices()[0], dict(run.pipe.mesh.shape)
    activation = run.pipe.activation_bytes(run.options.pipeline.microbatch_size, run.config.seq)
    record = {
        "options": dataclasses.asdict(run.options),
        "model": dataclasses.asdict(run.config),
        "parameters": models.parameters(run.config),
        "corpus": {
            "name": run.tokens.corpus.name,
            "fingerprint": run.tokens.corpus.fingerprint,
            "documents": run.tokens.corpus.documents,
            "train_tokens": len(run.tokens.train),
            "validation_tokens": len(run.tokens.validation),
            "unigram_entropy": unigram_entropy(run.tokens.validation),
        },
        "activation_bytes": activation,
        "activations_in_flight": [int(n) for n in run.pipe.program.in_flight],
        "mesh": layout,
        "device": device.device_kind,
        "processes": jax.process_count(),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
    }
    (run.output / "config.json").write_text(json.dumps(record, indent=2) + "\n")
    print(
        f"training {record['parameters']:,} parameters on {len(run.tokens.train):,} tokens of "
        f"{run.tokens.corpus.documents:,} documents\n{run.options.pipeline.schedule} {run.options.pipeline.method}, "
        f"{layout['pipe']} stages, "
        f"{layout['data']} data-parallel, on {record['device']} devices, {run.tokens_per_step:,} tokens a step\n"
        f"{sum(activation.values()) / 1e6:,.1f} MB for a microbatch in flight on a device, at most "
        f"{max(run.pipe.program.in_flight)} at once",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(TrainOptions, __doc__, arguments)
    run_training(or_fail(lambda: prepare(options)))


if __name__ == "__main__":
    main()
