"""What simulate.py can be asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from command_line.options import check_tail
from command_line.parsing import OptionalInt, OptionalStr
from vocabpp_jax import models
from vocabpp_jax.schedules.simulation.cost import Cost, load_gpu
from vocabpp_jax.schedules.simulation.simulator import COMPILED, FREE, GPU, ON_CPUS, Rules

RULES = {"gpu": GPU, "asynchronous": Rules("asynchronous"), "blocking": COMPILED, "on-cpus": ON_CPUS, "free": FREE}
OptionalRules = Annotated[
    Literal["gpu", "asynchronous", "blocking", "on-cpus", "free"] | None, tyro.conf.arg(metavar="RULES")
]


@dataclass(frozen=True)
class SimulateOptions:
    """What to simulate, on what, and what to write."""

    schedule: str = "1f1b"
    """Pipeline schedule."""
    method: str = "vocab-2"
    """How the embedding and the LM head are computed."""
    stages: int = 8
    """Pipeline stages: devices that one copy of the model is spread over."""
    chunks: OptionalInt = None
    """With interleaved-1f1b: chunks per device; default 2."""
    redis_split: Literal["published", "optimal"] = "published"
    """With redis: layers per stage as in the published experiments, or minimizing the slowest stage's FLOPs."""
    microbatches: OptionalInt = None
    """Microbatches per step; default 32, or 128 with --times, as published."""
    microbatch_size: int = 1
    """Sequences per microbatch."""
    model: str = "4B"
    """Named size: gpt-tiny, gpt-mini, gpt-small, or one of the published 4B, 7B, 10B, 16B, 21B, 30B."""
    layers: OptionalInt = None
    """Transformer layers; default: the model's."""
    hidden: OptionalInt = None
    """Model width; default: the model's."""
    seq: OptionalInt = None
    """Sequence length in tokens; default: the model's."""
    vocab_size: OptionalInt = None
    """Vocabulary size; default: the model's."""
    tie_embeddings: bool = False
    """Use the token embedding as the LM head."""
    mtp_depth: int = 0
    """Further tokens to predict, each by one more layer after the last and the same LM head."""
    gpu: str = "a100-80g"
    """GPU and network: a100-80g, h100-80g, or a .toml file like those in schedules/simulation/gpus."""
    times: OptionalStr = None
    """CSV of measured pass times in the columns of docs/paper/pass_times_8xA100.csv. Prints predicted and measured
    iteration times of each row; the network is --gpu's."""
    no_overlap: bool = False
    """Wait for every collective of the vocabulary layers where it is issued, as suits CPUs."""
    durations: OptionalStr = None
    """Pass times in milliseconds that override the model's and the GPU's: F=466,B=549,W=405,transfer=4, or any other
    field of schedules.Durations. H=0 is a pipeline without a head."""
    plain: bool = False
    """Repeat the schedule's building block unchanged instead of fitting the order of passes to their durations."""
    rules: OptionalRules = None
    """What waits for what: gpu, one program for all devices, each with one stream for transfers and one for
    collectives; asynchronous, with a stream for every transfer; blocking, with transfers that block both ends; on-cpus,
    with collectives that block too; free, one process per device. Default: gpu, or free with --times."""
    compare: bool = False
    """Print every schedule with every method, sorted by time."""
    json: OptionalStr = None
    """Write the result as JSON to this file, or to standard output if it is -."""
    plot: OptionalStr = None
    """Draw the timeline to this .png or .svg file."""
    trace: OptionalStr = None
    """Write the timeline as a trace for ui.perfetto.dev to this file."""
    csv: OptionalStr = None
    """Write what each device runs to this file, in the CSV of torch.distributed.pipelining, which torch can run."""
    csv_vocabulary: bool = False
    """Also write the passes of the vocabulary layers to the CSV; torch then rejects it."""

    def cost(self, seq: int | None = None, vocab_size: int | None = None) -> Cost:
        """The cost model."""
        given = {
            "layers": self.layers,
            "hidden": self.hidden,
            "seq": seq or self.seq,
            "vocab_size": vocab_size or self.vocab_size,
            "tie_embeddings": self.tie_embeddings or None,
        }
        check_tail(self.mtp_depth)
        config = models.named(self.model, **{name: value for name, value in given.items() if value is not None})
        return Cost(models.cost_sizes(config, self.microbatch_size, self.mtp_depth), load_gpu(self.gpu))
