"""The training script's options, their validation, and which of them a run must keep when it resumes."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from command_line import plan_file
from command_line.options import ClusterOptions, ModelOptions, PipelineOptions
from command_line.parsing import OptionalBucketPath, OptionalInt, OptionalStr
from vocabpp_jax import Model, checkpoints
from vocabpp_jax.data import STANDARD_LIBRARY, is_megatron
from vocabpp_jax.models import Config

OptionalFloat = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="(optional)")]


@dataclass(frozen=True)
class DataOptions:
    """The training data."""

    data: str = STANDARD_LIBRARY
    """A text file, a .jsonl or .parquet file with a field "text" per record, a folder of such files, a Megatron dataset
    (its .idx, its .bin, or both by their name without a suffix), or stdlib."""
    tokenizer: OptionalStr = None
    """A tokenizer.json to use instead of training one on the data."""
    end_of_text: OptionalStr = None
    """The tokenizer's token that follows every document. Default: the eos_token in the tokenizer_config.json next to
    the tokenizer, or else <|endoftext|>, <|end_of_text|>, <eos> or </s>, whichever it has."""
    damaged_data: Literal["refuse", "skip"] = "refuse"
    """What to do with a damaged file or record: refuse names it and stops; skip names and counts it, and continues."""
    document_masks: bool = False
    """Keep attention within documents, and do not count labels that belong to the next document."""


@dataclass(frozen=True)
class CheckpointOptions:
    """What is saved, and how a run resumes."""

    checkpoint_dir: OptionalBucketPath = None
    """Folder for checkpoints, local or gs://BUCKET/FOLDER. If it holds any, resume from the last intact one."""
    checkpoint_every: int = 100
    """Steps between checkpoints. The last step always saves one, and so does a step interrupted by SIGTERM."""
    checkpoint_keep: int = 3
    """How many of the newest checkpoints to keep."""
    checkpoint_keep_every: OptionalInt = None
    """Also keep, forever, those whose step is a multiple of this."""
    accept_changes: bool = False
    """Resume even though options that affect the result have changed since the checkpoint."""
    max_skipped: int = 10
    """Stop the run when more steps than this were skipped because of a non-finite loss or gradient."""
    hang_timeout: OptionalFloat = None
    """Stop the run when no step has ended for this many seconds; must exceed the compile time. Default: never."""


@dataclass(frozen=True)
class WatchOptions:
    """What a run reports besides metrics.jsonl."""

    tensorboard: bool = False
    """Also write the numbers for TensorBoard, to the output folder."""
    profile: OptionalInt = None
    """Trace this many steps, after the first three, to profile/ in the output folder; also write the prediction."""


@dataclass(frozen=True)
class TrainOptions:
    """What to train, on what, and for how long."""

    plan: OptionalStr = None
    """A plan file written by plan.py: the model and its layout over devices. Other options must agree with it."""
    output: OptionalStr = None
    """Folder for metrics.jsonl, loss.png and config.json. Default: the checkpoint folder, else a new one in runs/."""
    steps: int = 300
    """Optimizer steps."""
    lr: float = 3e-3
    """Peak learning rate; decays to a tenth of it with a cosine."""
    warmup: OptionalInt = None
    """Warm-up steps of the learning rate. Default: a tenth of the steps."""
    weight_decay: float = 0.1
    """Weight decay, on matrices only."""
    clip: float = 1.0
    """Maximum global gradient norm; larger gradients are scaled down to it."""
    eval_every: int = 100
    """Steps between validations. The last step always has one."""
    eval_batches: int = 8
    """Batches per validation, the same ones each time; fewer if the data has no more."""
    seed: int = 0
    """Random seed for the initial parameters and the order of the data."""
    pretrained: bool = False
    """Start from the weights in the Hugging Face folder that --model names."""
    export: OptionalStr = None
    """Write the final weights to this Hugging Face folder, which must not exist yet."""
    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    pipeline: PipelineOptions = field(default_factory=PipelineOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    watch: WatchOptions = field(default_factory=WatchOptions)
    cluster: ClusterOptions = field(default_factory=ClusterOptions)

    @property
    def warmup_steps(self) -> int:
        return self.steps // 10 if self.warmup is None else self.warmup

    def planned(self) -> TrainOptions:
        """The options with the plan applied. Raises ValueError for an invalid plan or a contradicting option."""
        model, pipeline = plan_file.merged(self.plan, self.model, self.pipeline)
        return dataclasses.replace(self, model=model, pipeline=pipeline)

    def check(self) -> None:
        """Raise ValueError for options that no run can have."""
        counts = {name: getattr(self, name) for name in ("steps", "eval_every", "eval_batches")}
        for name in ("checkpoint_every", "checkpoint_keep", "checkpoint_keep_every"):
            counts[name] = getattr(self.checkpoint, name)
        for name, value in (counts | {"profile": self.watch.profile}).items():
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        for name, value in (("lr", self.lr), ("clip", self.clip), ("hang_timeout", self.checkpoint.hang_timeout)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0")
        for name, value in (("seed", self.seed), ("max_skipped", self.checkpoint.max_skipped)):
            if value < 0:
                raise ValueError(f"{name} is {value}; it must not be negative")
        if self.pretrained and not self.model.folder:
            raise ValueError(f"pretrained is set and model is {self.model.model!r}; name a Hugging Face folder")
        if self.pretrained and self.data.tokenizer is None and not is_megatron(self.data.data):
            raise ValueError(
                "pretrained is set and tokenizer is not; give the tokenizer.json that the model was made with"
            )
        checkpoint_dir = self.checkpoint.checkpoint_dir
        if checkpoint_dir and checkpoints.in_bucket(checkpoints.folder_path(checkpoint_dir)) and self.output is None:
            raise ValueError(
                f"checkpoint_dir is {checkpoint_dir!r} and output is not given; metrics.jsonl is appended to, which a "
                "bucket does not allow: give a local folder as output"
            )

    def output_folder(self) -> Path:
        """The run's output folder."""
        pipeline = self.pipeline
        model = self.model.folder.name if self.model.folder else self.model.model
        name = f"{model}-{pipeline.schedule}-{pipeline.method}-p{pipeline.stages}"
        new = f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        return Path(os.path.expanduser(self.output or self.checkpoint.checkpoint_dir or new))

    def identity(self, config: Config, model: Model, corpus: dict[str, Any], tokens_per_step: int) -> dict[str, Any]:
        """What determines the numbers of the run, by name: it must not change when the run resumes.

        The layout over devices, how it computes (dtype, residuals) and where it writes may change.
        """
        of_model = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("dtype", "residuals")}
        of_model |= dataclasses.asdict(model.loss)
        if model.tail:
            of_model |= {"mtp_depth": model.tail.depths, "mtp_weight": model.tail.weight}
        own = {name: getattr(self, name) for name in ("steps", "lr", "weight_decay", "clip", "seed", "pretrained")}
        own |= {"warmup": self.warmup_steps, "document_masks": self.data.document_masks}
        return _plain(of_model | own | {"tokens_per_step": tokens_per_step} | corpus)

    def shared(self) -> dict[str, Any]:
        """What must be the same in all processes, by name. For paths, which may differ between hosts, only whether they
        are given; their contents are compared by :meth:`identity`."""
        paths = ("plan", "output", "export", "data", "tokenizer", "checkpoint_dir")
        values = _flat(self.record())
        if self.model.folder:
            values["model"] = "a folder"
        own = ("coordinator", "process_id")
        return {k: v is not None if k in paths else v for k, v in values.items() if k not in own}

    def record(self) -> dict[str, Any]:
        """All options, as plain values."""
        return _plain(dataclasses.asdict(self))


def check_output(output: Path, options: TrainOptions, identity: dict[str, Any]) -> None:
    """Raise ValueError for a folder that already holds a run, unless it is an earlier part of this one."""
    present = [file for file in ("config.json", "metrics.jsonl") if (output / file).exists()]
    if not present:
        return
    checkpoint_dir = options.checkpoint.checkpoint_dir
    if checkpoint_dir is None:
        raise ValueError(f"output is {str(output)!r}, which holds a run already; give another folder or remove it")
    if present == ["metrics.jsonl"] and not (output / "metrics.jsonl").stat().st_size:
        return  # killed before it had begun
    try:
        before = json.loads((output / "config.json").read_text())
        its = before["options"]["checkpoint"]["checkpoint_dir"]
        same = its is not None and _same_folder(its, checkpoint_dir)
        changed = checkpoints.changes(dict(before["identity"]), identity)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(
            f"output is {str(output)!r}, whose config.json cannot be read; give another folder or remove it"
        ) from None
    if not same:
        kept = "no checkpoint_dir" if its is None else f"checkpoint_dir {its!r}"
        raise ValueError(f"output is {str(output)!r}, which holds a run with {kept}; give another folder or remove it")
    # If there is a checkpoint, its own record says what the run has been since.
    if changed and not options.checkpoint.accept_changes and not checkpoints.steps_in(checkpoint_dir):
        raise ValueError(
            f"output is {str(output)!r}, from a run in which {', '.join(changed)}; give the old values, another output "
            "and checkpoint_dir, or --accept-changes"
        )


def make_folder(output: Path) -> None:
    """Create the folder and check that it is writable."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "metrics.jsonl").touch()
    except OSError as reason:
        raise ValueError(f"output is {str(output)!r}, which cannot be written ({reason.strerror})") from None


def _same_folder(a: str, b: str) -> bool:
    return len({x if checkpoints.in_bucket(x) else x.resolve() for x in map(checkpoints.folder_path, (a, b))}) == 1


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Nested options as a flat dict; their names are unique."""
    flat = {}
    for name, value in values.items():
        flat |= _flat(value) if isinstance(value, dict) else {name: value}
    return flat


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Values as they come back from JSON."""
    return json.loads(json.dumps(values))
