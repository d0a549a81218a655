"""How much is measured: everything, the most important parts in two minutes, or everything at CPU-friendly sizes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from vocabpp_jax.models import Config
from vocabpp_jax.pipeline.mesh import GPU_PLATFORMS


@dataclass(frozen=True)
class Row:
    """A published model on its published number of devices, and what is measured of it.

    Attributes:
        model, p: a named size, and its pipeline stages.
        vocabularies, sequences: measured in every combination.
        methods: whose vocabulary passes are timed.
        table3: whether the whole output and input layers are timed too, to see how their shards scale.
    """

    model: str
    p: int
    vocabularies: tuple[int, ...]
    sequences: tuple[int, ...]
    table3: bool = False
    methods: tuple[str, ...] = ("vocab-2", "vocab-1", "baseline")


@dataclass(frozen=True)
class Size:
    """What the parts measure.

    Attributes:
        name: tiny, quick or whole.
        minutes: time limit for all parts together.
        rows: models whose passes are timed.
        stage_model, stage_methods, stages: whose real stages run under a mocked topology, and which; all if empty.
        stage_microbatches: microbatches of their step.
        steps: steps on which the executor is compared with a plain step: name, fields of a GPT, microbatches.
        torch_vocabularies: vocabulary sizes of the PyTorch head.
        parity: which parity cases are compared.
        repeats: timing rounds.
        swept: float32 values changed between passes, more than caches hold.
    """

    name: str
    minutes: float
    rows: tuple[Row, ...]
    stage_row: Row
    stage_methods: tuple[str, ...]
    stages: tuple[int, ...]
    stage_microbatches: int
    steps: tuple[tuple[str, dict[str, int], int], ...]
    torch_vocabularies: tuple[int, ...]
    parity: str = "whole"
    repeats: int = 3
    swept: int = 2**24


_V = (32_000, 64_000, 128_000, 256_000)
_METHODS = ("vocab-2", "vocab-1", "baseline", "vocab-naive")  # the last is a reference that nobody would run
_STAGE = dict(layers=4, heads=24, hidden=3072, seq=2048, vocab_size=4000)
_SMALL = dict(layers=4, heads=12, hidden=768, seq=1024, vocab_size=4000)

WHOLE = Size(
    name="whole",
    minutes=8.0,
    rows=(
        Row("4B", 8, _V, (2048,), table3=True, methods=_METHODS),
        Row("21B", 32, _V, (2048,), table3=True, methods=_METHODS),
        Row("4B", 8, _V, (4096,), table3=True),
        Row("21B", 32, _V, (4096,), table3=True),
        Row("10B", 16, (256_000,), (2048, 4096), table3=True),
    ),
    stage_row=Row("4B", 8, (256_000,), (2048,)),
    stage_methods=("vocab-2", "baseline"),
    stages=(),
    stage_microbatches=32,
    steps=(("a stage of 4B", _STAGE, 8), ("small layers", _SMALL, 32)),
    torch_vocabularies=(32_000, 256_000),
)
QUICK = dataclasses.replace(
    WHOLE,
    name="quick",
    minutes=2.5,
    rows=(Row("4B", 8, (256_000,), (2048,), table3=True, methods=("vocab-2", "baseline")),),
    stage_methods=("vocab-2",),
    stages=(7, 0),
    steps=(("a stage of 4B", _STAGE, 8),),
    torch_vocabularies=(32_000,),
    parity="quick",
)
TINY = dataclasses.replace(
    WHOLE,
    name="tiny",
    rows=(Row("gpt-tiny", 2, (128,), (16,), table3=True, methods=("vocab-2", "baseline")),),
    stage_row=Row("gpt-tiny", 2, (128,), (16,)),
    stage_methods=("vocab-2",),
    stages=(1,),
    stage_microbatches=4,
    steps=(("tiny", dict(layers=2, heads=2, hidden=16, seq=8, vocab_size=32), 4),),
    torch_vocabularies=(32,),
    parity="tiny",
    repeats=1,
    swept=2**12,
)
SIZES = {size.name: size for size in (TINY, QUICK, WHOLE)}


def as_run_on(device: Any, config: Config) -> Config:
    """The model as a device runs it: on a GPU with cuDNN's attention, if it supports the heads."""
    cudnn = device.platform in GPU_PLATFORMS and config.fits_cudnn
    return dataclasses.replace(config, attention="cudnn" if cudnn else "xla")
