"""A training run and its reports: its description, the numbers of every step, how it ended."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from training_run import kept_schedule
from training_run.train_export import Export
from training_run.train_options import TrainOptions
from vocabpp_jax import Pipeline, checkpoints, models
from vocabpp_jax.data import TokenizedCorpus, training_batches, validation_batches
from vocabpp_jax.models import Config
from vocabpp_jax.runtime import hosts
from vocabpp_jax.runtime.hardware import mfu, peak_memory
from vocabpp_jax.runtime.metrics import JsonLines, TensorBoard, draw_losses, read_records
from vocabpp_jax.runtime.profiling import predicted_trace
from vocabpp_jax.vocab import ahead


@dataclass(frozen=True)
class Run:
    """Everything a run needs, validated; nothing of the training step is compiled yet."""

    options: TrainOptions
    config: Config
    pipe: Pipeline
    optimizer: Any
    tokens: TokenizedCorpus
    output: Path
    loaded: checkpoints.Loaded | None
    writer: checkpoints.Writer | None
    export: Export | None = None

    @cached_property
    def canonical(self) -> checkpoints.Canonical:
        return checkpoints.Canonical(self.pipe, self.optimizer)

    @property
    def shape(self) -> dict[str, int]:
        """Microbatches, sequences in each over all copies of the model, and sequence length."""
        pipeline = self.options.pipeline
        batch = pipeline.microbatch_size * self.pipe.mesh.shape["data"]
        return {"microbatches": pipeline.microbatches, "batch": batch, "seq": self.config.seq}

    @property
    def tokens_per_step(self) -> int:
        return int(np.prod(list(self.shape.values())))

    @property
    def identity(self) -> dict[str, Any]:
        model = self.pipe.model
        return self.options.identity(self.config, model, self.tokens.identity, self.tokens_per_step)

    def place(self, local: dict[str, Any]) -> dict[str, Any]:
        return hosts.place(self.pipe.mesh, self.shape["batch"], local)

    def data(self, rows: int) -> tuple[Any, Any]:
        """Training batches from a row on, and validation batches; this process reads only its part."""
        shape = self.shape | {"columns": hosts.columns(self.pipe.mesh, self.shape["batch"])}
        train_ends, validation_ends = self.tokens.ends if self.options.data.document_masks else (None, None)
        return (
            training_batches(self.tokens.train, **shape, seed=self.options.seed, ends=train_ends, start=rows),
            validation_batches(
                self.tokens.validation, **shape, at_most=self.options.eval_batches, ends=validation_ends
            ),
        )


def say_once(text: str) -> None:
    """Print it, in process 0 only."""
    if jax.process_index() == 0:
        print(text, flush=True)


def sample(tokens: TokenizedCorpus, windows: int = 64, width: int = 1024) -> dict[str, Any]:
    """The length of each split and a hash of some of its tokens, to compare between processes: each has read its own
    files or its own cache."""
    found = {}
    for name, split in (("train", tokens.train), ("validation", tokens.validation)):
        digest = hashlib.blake2b(digest_size=8)
        for start in np.linspace(0, max(0, len(split) - width), windows, dtype=np.int64):
            digest.update(np.asarray(split[start : start + width], np.int64).tobytes())
        found |= {f"{name}_tokens": len(split), f"{name}_sample": digest.hexdigest()}
    return found


def how_to_resume(run: Run) -> str:
    """How to resume the run from what has been saved."""
    folder = run.options.checkpoint.checkpoint_dir
    steps = checkpoints.steps_in(folder) if folder else []
    if not steps:
        return "there is no checkpoint to resume from"
    return f"the same command resumes from step {steps[-1]}, in {folder}"


def hardware_record(run: Run, seconds: float) -> dict[str, Any]:
    """How well a step used the devices, if they are known."""
    sizes = models.cost_sizes(run.config, run.shape["batch"], run.pipe.model.depths)
    flops = sizes.iteration_flops(run.shape["microbatches"])
    return {"mfu": mfu(flops, seconds, list(run.pipe.mesh.devices.flat)), "memory_bytes": peak_memory()}


def write_prediction(run: Run, seconds: float) -> None:
    """Write the predicted timeline of a step next to the measured trace."""
    sizes = models.cost_sizes(run.config, run.options.pipeline.microbatch_size, run.pipe.model.depths)
    trace = predicted_trace(run.pipe.schedule, sizes, jax.devices()[0], seconds)
    (run.output / "profile" / "predicted.trace.json").write_text(trace)


class Records:
    """Writes the numbers of every step, in process 0 only."""

    def __init__(self, run: Run, after: int):
        self._writers = []
        if jax.process_index() == 0:
            self._writers.append(JsonLines(run.output / "metrics.jsonl", after))
            if run.options.watch.tensorboard:
                self._writers.append(TensorBoard(run.output / "tensorboard", after))

    def write(self, **record: Any) -> None:
        for writer in self._writers:
            writer.write(**record)

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self._writers:
            writer.close()


def validation_losses(run: Run, batches: Any, evaluate: Any, params: Any) -> list[float]:
    """Mean losses over all tokens of the validation batches, whose last may be partly masked: of the next token, and of
    each further predicted token."""
    depths = run.pipe.model.depths
    total, count = np.zeros(1 + depths), np.zeros(1 + depths)
    for i in range(len(batches)):
        batch = run.place(batches[i])
        documents = batch.get("aux_inputs", {}).get("segment_ids")
        _, counted = ahead(batch["labels"], batch["mask"], depths, documents)
        valid = np.asarray(jnp.sum(counted, (0, 2, 3)), np.float64)
        total, count = total + np.asarray(evaluate(params, batch)) * valid, count + valid
    return (total / np.maximum(count, 1)).tolist()


def summarise(run: Run) -> None:
    """Plot the losses of the whole run, including earlier parts, and print how it ended."""
    records, entropy = read_records(run.output / "metrics.jsonl"), run.tokens.entropy
    losses = [(r["step"], r["loss"]) for r in records if r["loss"] is not None]
    validations = [(r["step"], r["validation_loss"]) for r in records if r.get("validation_loss") is not None]
    draw_losses(run.output / "loss.png", losses, validations, entropy)
    if losses and validations:
        recent = np.mean([loss for _, loss in losses[-20:]])
        print(
            f"train loss {recent:.4f}, validation loss {validations[-1][1]:.4f}; a model that knows only how frequent "
            f"every token is\nreaches the unigram entropy, {entropy:.4f} (all in nats per token)"
        )
        for k in range(1, 1 + run.pipe.model.depths):
            print(f"depth {k}, which predicts {k} further: {records[-1][f'validation_loss_depth_{k}']:.4f}")
    print(f"written to {run.output}: metrics.jsonl, loss.png, config.json")


def describe(run: Run, begin: int) -> None:
    """Write config.json, with everything that determines the run, and print what is about to happen. A part that
    resumes from a checkpoint writes its own config next to it."""
    device, layout = jax.devices()[0], dict(run.pipe.mesh.shape)
    activation = run.pipe.activation_bytes(run.options.pipeline.microbatch_size, run.config.seq)
    record = {
        "options": run.options.record(),
        "identity": run.identity,
        "model": dataclasses.asdict(run.config),
        "parameters": sum(x.size for x in jax.tree.leaves(run.pipe.model.param_shapes())),
        "corpus": {
            "name": run.tokens.name,
            "fingerprint": run.tokens.fingerprint,
            "documents": run.tokens.documents,
            "damaged": list(run.tokens.damaged),
            "notes": list(run.tokens.notes),
            "train_tokens": len(run.tokens.train),
            "validation_tokens": len(run.tokens.validation),
            "unigram_entropy": run.tokens.entropy,
        },
        "schedule": kept_schedule.record(run.pipe.schedule, run.options, run.config),
        "activation_bytes": activation,
        "activations_in_flight": [int(n) for n in run.pipe.program.in_flight],
        "mesh": layout,
        "device": device.device_kind,
        "processes": jax.process_count(),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
    }
    config = run.output / ("config.json" if not begin else f"config-{begin}.json")
    partial = config.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=2) + "\n")
    partial.replace(config)
    print(
        f"training {record['parameters']:,} parameters on {len(run.tokens.train):,} tokens of "
        f"{run.tokens.documents:,} documents\n{run.options.pipeline.schedule} {run.options.pipeline.method}, "
        f"{layout['pipe']} stages, "
        f"{layout['data']} data-parallel, on {record['device']} devices, {run.tokens_per_step:,} tokens per step\n"
        f"{sum(activation.values()) / 1e6:,.1f} MB per microbatch in flight on a device, at most "
        f"{max(run.pipe.program.in_flight)} at once",
        flush=True,
    )
