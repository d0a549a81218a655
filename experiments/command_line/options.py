"""The options that several experiments share, so that a name means the same in all of them."""

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
from vocabpp_jax.schedules.simulation.cost import GPU, Cost, load_gpu
from vocabpp_jax.vocab import Loss

MOST_PASSES = 2**19
"""Stages times microbatches: a schedule names every pass, and this many take about a minute to check and lower."""

MOST_DEPTHS = 16
"""Further tokens that can be predicted; published models have 1 to 4."""

# Without these, tyro writes "{None}|INT" and "(default: None)" for what may be left out.


@dataclass(frozen=True)
class ModelOptions:
    """A named model, and what of it is to be different. What is not given is as the name says."""

    model: str = "gpt-micro"
    """Named size: gpt-tiny, gpt-micro (two CPU cores train it in minutes), gpt-mini, gpt-small, one of the published
    4B, 7B, 10B, 16B, 21B, 30B, or another architecture: llama-tiny, llama-3-8b, qwen-tiny, qwen3-8b, gemma-tiny,
    gemma2-9b and their like. Or a Hugging Face folder, whose config.json says what it is."""
    layers: OptionalInt = None
    """Transformer layers, at least one a stage."""
    hidden: OptionalInt = None
    """Model width."""
    heads: OptionalInt = None
    """Attention heads; they divide the width."""
    seq: OptionalInt = None
    """Sequence length in tokens."""
    vocab_size: OptionalInt = None
    """Tokens in the vocabulary. Any number: it need not be a multiple of the stages."""
    tie_embeddings: bool = False
    """Use the token embedding as the LM head."""
    untie_embeddings: bool = False
    """Give the LM head a table of its own where the named model has none."""
    residuals: OptionalStr = None
    """What a forward leaves for its backward: selective (norms and activation functions are computed again),
    everything, or full (all of a layer is computed again from its input, and twice where W is a pass of its own)."""
    dtype: OptionalStr = None
    """What passes compute in: float32 or bfloat16. Parameters, losses and gradients' sums over microbatches are float32
    either way; what devices send each other is in this dtype."""
    soft_cap: OptionalFloat = None
    """Squash logits into plus and minus this; Gemma 2 has 30 of its own."""
    z_loss: float = 0.0
    """Weight of the squared log-partition in the loss, 1e-4 for example."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over the whole vocabulary."""

    mtp_depth: int = 0
    """Tokens beyond the next that are predicted too, each by one more layer behind the last and the same LM head
    (multi-token prediction as in DeepSeek-V3)."""
    mtp_weight: float = 0.3
    """With mtp_depth: what their losses weigh together beside that of the next token."""

    LOSS: ClassVar[tuple[str, ...]] = ("soft_cap", "z_loss", "label_smoothing")
    TAIL: ClassVar[tuple[str, ...]] = ("mtp_depth", "mtp_weight")

    def config(self) -> Config:
        """The model's configuration. Raises ValueError for what makes no model."""
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
        """The Hugging Face folder, where the model is one. A name stays a name beside a folder that is called so."""
        named = self.model in models.SIZES
        return Path(self.model) if not named and (os.sep in self.model or Path(self.model).is_dir()) else None

    def build(self, config: Config | None = None) -> Model:
        """The model with its loss, as ``config`` says where one is given. Raises ValueError for what makes none."""
        model = models.build(config or self.config(), self.mtp_depth, self.mtp_weight)
        given = {name: getattr(self, name) for name in self.LOSS if getattr(self, name) is not None}
        return dataclasses.replace(model, loss=dataclasses.replace(model.loss, **given))

    def refuse_other_losses(self) -> None:
        """Raises ValueError where the loss is more than the cross entropy, which is all that other programs compute."""
        if self.mtp_depth:
            raise ValueError(
                f"mtp_depth is {self.mtp_depth}; what it is compared with predicts the next token only, so leave it out"
            )
        if (loss := self.build().loss) != Loss():
            raise ValueError(
                f"the loss is {loss}; what it is compared with has the plain cross entropy, so leave out "
                f"{', '.join(self.LOSS)}, and take a model without a soft cap"
            )


def check_tail(depth: int, weight: float = 1.0) -> None:
    """Raises ValueError for what predicts no further tokens."""
    if not 0 <= depth <= MOST_DEPTHS:
        raise ValueError(f"mtp_depth is {depth}; it must be 0, for none, or up to {MOST_DEPTHS}")
    if not 0 < weight < float("inf"):
        raise ValueError(f"mtp_weight is {weight}; it must be above 0 and finite")


@dataclass(frozen=True)
class PipelineOptions:
    """How the model is laid over devices, and in which order they work."""

    schedule: str = "1f1b"
    """Pipeline schedule."""
    method: str = "vocab-2"
    """How the embedding and the LM head are computed: baseline (the first and the last stage hold them), redis (so,
    with fewer layers on the last), or sharded over the stages as vocab-1 (two barriers), vocab-2 (one), vocab-naive
    (three) or interlaced (all of it at once)."""
    stages: int = 4
    """Pipeline stages: devices that one copy of the model is spread over. Simulated where there are only CPUs."""
    chunks: OptionalInt = None
    """With interleaved-1f1b: how many pieces of the model a device holds; 2 if not given."""
    redis_split: Literal["published", "optimal"] = "published"
    """With redis: layers a stage as in the published experiments, or so that the slowest has the fewest FLOPs."""
    data_parallel: OptionalInt = None
    """Copies of the model, each training on its part of the batch. Without it, as many as there are devices for."""
    tensor_parallel: int = 1
    """Devices that share each stage: every layer's matrices are split over them, and the vocabulary over them too."""
    microbatches: int = 8
    """Microbatches in a step."""
    microbatch_size: int = 2
    """Sequences in a microbatch, for each copy of the model."""
    shard_optimizer: Literal["on", "off"] = "on"
    """Whether the copies of the model, where there are several, share the float32 parameters and the optimizer's state,
    a part on each, and gather and scatter once a step. Where off, each keeps all of them."""
    no_overlap: bool = False
    """Wait for every collective of the vocabulary layers where it is issued, all of them in one place of an interval,
    as suits CPUs, whose collectives let no pass run beside them."""
    fit: OptionalStr = None
    """The GPU, such as h100-80g, to whose pass times the order of passes is fitted; the one at hand if not given, or
    none to repeat the schedule's building block as it is, as on CPUs."""

    def on(self, platform: str) -> PipelineOptions:
        """The same for what it is to be timed on: a CPU that waits for a collective does nothing else meanwhile."""
        return dataclasses.replace(self, no_overlap=self.no_overlap or platform == "cpu")

    def build(
        self, config: Config, at_hand: GPU | None = None, rules: Rules = schedules.GPU, mtp_depth: int = 0
    ) -> Schedule:
        """The schedule for a model, fitted to the GPU that the options name or that is at hand.

        Raises:
            ValueError: an unknown name, or what cannot be scheduled.
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
        """The mesh of devices. Raises ValueError where the devices there are cannot be laid out so."""
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
        """The model on the mesh. Raises ValueError for what does not fit together."""
        return Pipeline(model, schedule, mesh, dtype, shard_optimizer=self.shard_optimizer == "on")

    @property
    def devices(self) -> int:
        """Devices to simulate where there are none: one copy's, or as many copies' as are asked for."""
        return max(1, self.stages) * max(1, self.tensor_parallel) * max(1, self.data_parallel or 1)


@dataclass(frozen=True)
class ClusterOptions:
    """Several processes, for example one a host, that train one model. Every one of them runs this same command."""

    distributed: bool = False
    """This is one of several processes that SLURM or Open MPI has started."""
    coordinator: OptionalStr = None
    """Without SLURM or Open MPI: HOST:PORT, where process 0 is to listen."""
    processes: OptionalInt = None
    """With a coordinator: how many processes there are."""
    process_id: OptionalInt = None
    """With a coordinator: which of them this is, from 0."""

    heartbeat_timeout: int = 60
    """Seconds without a sign of life after which a process counts as gone, and all the others end."""
    join_timeout: OptionalInt = None
    """Seconds in which all processes must have started; 300 if not given."""

    @property
    def several(self) -> bool:
        """Whether this is meant to be one of several processes."""
        return self.distributed or any(v is not None for v in (self.coordinator, self.processes, self.process_id))

    def tell_and_fail(self, problem: ValueError) -> NoReturn:
        """End because of a problem that the other processes may not have, and let them know if there are any."""
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
        """Find the other processes, if there are any; where there are only CPUs, have them simulate devices.

        To be called before anything asks JAX for a device. Raises ValueError where there is none, or not all come.
        """
        processes = 1
        if self.several:
            timeouts = {"heartbeat_timeout": self.heartbeat_timeout, "join_timeout": self.join_timeout}
            processes = hosts.join(self.coordinator, self.processes, self.process_id, **timeouts)
        # Whoever sets the number of CPU devices in XLA_FLAGS means it.
        if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
            jax.config.update("jax_num_cpu_devices", max(1, simulated_devices // processes))
        # Here the processes learn of each other's devices, and wait for each other.
        words = "ended while it looked for the devices of all processes; another process may be gone"
        with LastWords(words, wanted=self.several, who=f"{socket.gethostname()}: "):
            all_devices()
