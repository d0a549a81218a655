"""Options shared by several experiments, so that a name means the same in all of them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NoReturn

import jax

from command_line.parsing import OptionalFloat, OptionalInt, OptionalStr, fail
from vocabpp_jax import Model, Pipeline, make_mesh, models, schedules
from vocabpp_jax.models import Config
from vocabpp_jax.pipeline.mesh import all_devices
from vocabpp_jax.runtime import hosts
from vocabpp_jax.runtime.faults import LastWords
from vocabpp_jax.schedules import Rules, Schedule
from vocabpp_jax.schedules.layers import redistributed
from vocabpp_jax.schedules.schedule import MOST_PASSES
from vocabpp_jax.schedules.simulation.cost import GPU, Cost, load_gpu
from vocabpp_jax.vocab import Loss

MOST_DEVICES = 128
"""Limit on the devices of a process: each simulated one has threads, and XLA aborts if it can start no more."""

MOST_DEPTHS = 16
"""Maximum multi-token-prediction depth; published models have 1 to 4."""

# Without these, tyro writes "{None}|INT" and "(default: None)" for optional values.


@dataclass(frozen=True)
class ModelOptions:
    """A named model and overrides of its fields."""

    model: str = "gpt-micro"
    """Named size: gpt-tiny, gpt-micro (trains in minutes on two CPU cores), gpt-mini, gpt-small, one of the published
    4B, 7B, 10B, 16B, 21B, 30B, or another architecture: llama-tiny, llama-3-8b, qwen-tiny, qwen3-8b, gemma-tiny,
    gemma2-9b and similar. Or a Hugging Face folder, whose config.json describes the model."""
    layers: OptionalInt = None
    """Transformer layers, at least one per stage."""
    hidden: OptionalInt = None
    """Model width."""
    heads: OptionalInt = None
    """Attention heads; must divide the width."""
    seq: OptionalInt = None
    """Sequence length in tokens."""
    vocab_size: OptionalInt = None
    """Vocabulary size. Any number: it need not be a multiple of the stages."""
    tie_embeddings: bool = False
    """Use the token embedding as the LM head."""
    untie_embeddings: bool = False
    """Give the LM head its own table even if the named model ties it."""
    residuals: OptionalStr = None
    """What a forward keeps for its backward: selective (norms and activation functions are recomputed), everything, or
    full (the whole layer is recomputed from its input, twice if W is a separate pass)."""
    dtype: OptionalStr = None
    """Compute dtype of the passes: float32 or bfloat16. Parameters, losses and gradient accumulation are float32 either
    way; devices send each other this dtype."""
    soft_cap: OptionalFloat = None
    """Soft cap on logits: squash them to ± this value; Gemma 2 sets 30 by itself."""
    z_loss: float = 0.0
    """Weight of the z-loss, the squared log-partition function; for example 1e-4."""
    label_smoothing: float = 0.0
    """Label smoothing: the share of the target spread uniformly over the vocabulary."""

    mtp_depth: int = 0
    """Further tokens to predict, each by one more layer after the last and the same LM head (multi-token prediction as
    in DeepSeek-V3)."""
    mtp_weight: float = 0.3
    """With mtp_depth: the total weight of these losses relative to the next-token loss."""

    LOSS: ClassVar[tuple[str, ...]] = ("soft_cap", "z_loss", "label_smoothing")
    TAIL: ClassVar[tuple[str, ...]] = ("mtp_depth", "mtp_weight")

    def config(self) -> Config:
        """The model's configuration. Raises ValueError for an invalid one."""
        if self.tie_embeddings and self.untie_embeddings:
            raise ValueError("tie_embeddings and untie_embeddings are both given; give one of them")
        check_tail(self.mtp_depth, self.mtp_weight)
        apart = ("model", *self.LOSS, *self.TAIL)
        given = {name: value for name, value in dataclasses.asdict(self).items() if name not in apart}
        given = {name: value for name, value in given.items() if value is not None and value is not False}
        if given.pop("untie_embeddings", False):
            given["tie_embeddings"] = False
        if self.folder:
            return dataclasses.replace(models.huggingface.load_config(self.folder), **given)
        return models.named(self.model, **given)

    @property
    def folder(self) -> Path | None:
        """The Hugging Face folder, if the model is one. A known name takes precedence over a folder of that name."""
        named = self.model in models.SIZES
        return Path(self.model) if not named and (os.sep in self.model or Path(self.model).is_dir()) else None

    def build(self, config: Config | None = None) -> Model:
        """The model with its loss, for ``config`` if given. Raises ValueError if that is invalid."""
        model = models.build(config or self.config(), self.mtp_depth, self.mtp_weight)
        given = {name: getattr(self, name) for name in self.LOSS if getattr(self, name) is not None}
        return dataclasses.replace(model, loss=dataclasses.replace(model.loss, **given))

    def refuse_other_losses(self) -> None:
        """Raise ValueError unless the loss is the plain cross-entropy, the only one that other programs compute."""
        if self.mtp_depth:
            raise ValueError(
                f"mtp_depth is {self.mtp_depth}; the other programs only predict the next token, so leave it out"
            )
        if (loss := self.build().loss) != Loss():
            raise ValueError(
                f"the loss is {loss}; the other programs compute the plain cross-entropy, so leave out "
                f"{', '.join(self.LOSS)}, and choose a model without a soft cap"
            )


def check_tail(depth: int, weight: float = 1.0) -> None:
    """Raise ValueError for an invalid multi-token-prediction depth or weight."""
    if not 0 <= depth <= MOST_DEPTHS:
        raise ValueError(f"mtp_depth is {depth}; it must be 0, for none, or up to {MOST_DEPTHS}")
    if not 0 < weight < float("inf"):
        raise ValueError(f"mtp_weight is {weight}; it must be above 0 and finite")


@dataclass(frozen=True)
class PipelineOptions:
    """How the model is laid out over devices, and the order of work."""

    schedule: str = "1f1b"
    """Pipeline schedule."""
    method: str = "vocab-2"
    """How the embedding and the LM head are computed: baseline (on the first and the last stage), redis (the same, with
    fewer layers on the last), or sharded over the stages as vocab-1 (two barriers), vocab-2 (one), vocab-naive (three)
    or interlaced (synchronously)."""
    stages: int = 4
    """Pipeline stages: devices that one copy of the model is spread over. Simulated if there are only CPUs."""
    chunks: OptionalInt = None
    """With interleaved-1f1b: chunks per device; default 2."""
    redis_split: Literal["published", "optimal"] = "published"
    """With redis: layers per stage as in the published experiments, or minimizing the slowest stage's FLOPs."""
    data_parallel: OptionalInt = None
    """Data-parallel copies of the model. Default: as many as the devices allow."""
    tensor_parallel: int = 1
    """Devices that share each stage: every layer's matrices are sharded over them, and so is the vocabulary."""
    microbatches: int = 8
    """Microbatches per step."""
    microbatch_size: int = 2
    """Sequences per microbatch, for each copy of the model."""
    shard_optimizer: Literal["on", "off"] = "on"
    """Whether data-parallel copies shard the float32 parameters and the optimizer state among them, with one
    reduce-scatter and all-gather per step. If off, each keeps all of them."""
    no_overlap: bool = False
    """Wait for every collective of the vocabulary layers where it is issued, with all of them at one place in the
    interval, as suits CPUs, where collectives cannot overlap with passes."""
    fit: OptionalStr = None
    """The GPU, such as h100-80g, whose pass times the order of passes is fitted to; default: the one in this machine.
    "none" repeats the schedule's building block unchanged, as on CPUs."""

    def on(self, platform: str) -> PipelineOptions:
        """The same options for timing on a platform: a CPU that waits for a collective does nothing else meanwhile."""
        return dataclasses.replace(self, no_overlap=self.no_overlap or platform == "cpu")

    def build(
        self, config: Config, at_hand: GPU | None = None, rules: Rules = schedules.GPU, mtp_depth: int = 0
    ) -> Schedule:
        """The schedule for a model, fitted to the GPU that the options name or that is in this machine.

        Raises:
            ValueError: an unknown name, or something that cannot be scheduled.
        """
        for name in ("stages", "microbatches", "microbatch_size", "tensor_parallel", "data_parallel"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if (passes := self.stages * self.microbatches) > MOST_PASSES:
            raise ValueError(
                f"stages {self.stages} times microbatches {self.microbatches} is {passes}; a schedule can have up to "
                f"{MOST_PASSES}"
            )
        sizes, counts = models.cost_sizes(config, self.microbatch_size, mtp_depth), None
        if self.method == "redis":
            counts = redistributed(self.redis_split, layers=config.layers, stages=self.stages, rho=sizes.ends_in_layers)
        gpu = at_hand if self.fit is None else None if self.fit == "none" else load_gpu(self.fit)
        cost = gpu and Cost(sizes, gpu)
        return schedules.build(
            schedule=self.schedule,
            method=self.method,
            p=self.stages,
            m=self.microbatches,
            chunks=self.chunks,
            layer_counts=counts,
            durations=cost and cost.durations,
            rules=rules,
            overlap=not self.no_overlap,
        )

    def mesh(self) -> jax.sharding.Mesh:
        """The device mesh. Raises ValueError if the available devices cannot form it."""
        devices, one = len(all_devices()), self.stages * self.tensor_parallel
        if devices % one:
            times = f" times tensor_parallel {self.tensor_parallel} is {one}" if self.tensor_parallel > 1 else ""
            raise ValueError(
                f"stages is {self.stages}{times}; it must divide the devices, of which there are {devices} "
                f"({jax.devices()[0].device_kind})"
            )
        copies = devices // one if self.data_parallel is None else self.data_parallel
        if devices // one % copies:
            raise ValueError(
                f"data_parallel is {copies}; it must divide the {devices // one} copies of the model that the devices "
                f"have room for ({devices}, of which a copy takes {one})"
            )
        return make_mesh(self.stages, copies, all_devices()[: one * copies], tensor=self.tensor_parallel)

    def place(self, model: Model, schedule: Schedule, mesh: jax.sharding.Mesh, dtype: str) -> Pipeline:
        """The model on the mesh. Raises ValueError if they do not fit together."""
        return Pipeline(model, schedule, mesh, dtype, shard_optimizer=self.shard_optimizer == "on")

    @property
    def devices(self) -> int:
        """Devices to simulate if there are only CPUs: for one copy, or for the requested number of copies."""
        return max(1, self.stages) * max(1, self.tensor_parallel) * max(1, self.data_parallel or 1)


@dataclass(frozen=True)
class ClusterOptions:
    """Several processes, for example one per host, that train one model. All of them run this same command."""

    distributed: bool = False
    """This is one of several processes started by SLURM or Open MPI."""
    coordinator: OptionalStr = None
    """Without SLURM or Open MPI: HOST:PORT where process 0 listens."""
    processes: OptionalInt = None
    """With a coordinator: the number of processes."""
    process_id: OptionalInt = None
    """With a coordinator: the index of this process, from 0."""

    heartbeat_timeout: int = 60
    """Seconds of silence after which a process counts as lost and all others end."""
    join_timeout: OptionalInt = None
    """Seconds within which all processes must have started; default 300."""

    @property
    def several(self) -> bool:
        """Whether this process is meant to be one of several."""
        return self.distributed or any(v is not None for v in (self.coordinator, self.processes, self.process_id))

    def tell_and_fail(self, problem: ValueError) -> NoReturn:
        """Exit because of a problem that the other processes may not have, letting them know if there are any."""
        if self.several:
            print(f"error: {problem}", file=sys.stderr, flush=True)  # joining may take long

            def refuse() -> NoReturn:
                raise problem

            with contextlib.suppress(ValueError):
                self.join(simulated_devices=1)
                hosts.agree(refuse)
            raise SystemExit(2)
        fail(str(problem))

    def join(self, simulated_devices: int) -> None:
        """Find the other processes, if any; on CPU-only machines, have them simulate devices.

        Call this before anything asks JAX for a device. Raises ValueError if there is no device, if too many would have
        to be simulated, or if not all processes come.
        """
        processes = 1
        if self.several:
            timeouts = {"heartbeat_timeout": self.heartbeat_timeout, "join_timeout": self.join_timeout}
            processes = hosts.join(self.coordinator, self.processes, self.process_id, **timeouts)
        wanted = max(1, simulated_devices // processes)
        if wanted > MOST_DEVICES:
            raise ValueError(
                f"stages, data_parallel and tensor_parallel ask for {wanted} devices per process; "
                f"a process can have up to {MOST_DEVICES}"
            )
        # A device count in XLA_FLAGS was set on purpose.
        if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
            jax.config.update("jax_num_cpu_devices", wanted)
        # Here the processes learn of each other's devices, and wait for each other.
        words = "ended while it looked for the devices of all processes; another process may be gone"
        with LastWords(words, wanted=self.several, who=f"{socket.gethostname()}: "):
            all_devices()
