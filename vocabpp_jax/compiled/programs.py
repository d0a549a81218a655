"""The programs of a training run, compiled for the pipeline's devices, which need not be present."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from .. import training
from ..checkpoints.canonical import Canonical, make_fingerprints
from ..pipeline import initialization
from ..pipeline.mesh import DATA
from ..pipeline.pipeline import Batch, Pipeline

PROGRAMS = {
    "init": "draw the parameters and initialize the optimizer state",
    "step": "one training step",
    "evaluate": "the loss of a batch",
    "save": "copy the state into canonical form and fingerprint the copy",
    "restore": "fingerprint a checkpoint's arrays and convert them to the state",
    "import": "initialize the optimizer state for parameters read from a Hugging Face folder",
}
"""The programs by name, and what each does."""


class ProgramReport(NamedTuple):
    """What the compiler reports for one of :data:`PROGRAMS`; bytes are per device.

    Attributes:
        peak_bytes: peak memory while it runs, including what a run keeps on the device meanwhile.
        temp_bytes: scratch space; the maximum over its parts.
        output_bytes: bytes of its results; the maximum over its parts.
        compile_seconds: tracing, lowering and compiling, summed over its parts.
    """

    name: str
    peak_bytes: int
    temp_bytes: int
    output_bytes: int
    compile_seconds: float


class Part(NamedTuple):
    """One executable of a program, and the bytes live on a device besides its arguments and results."""

    lower: Callable[[], jax.stages.Lowered]
    beside: int = 0


@dataclass(frozen=True)
class Programs:
    """The programs for training ``pipe`` with ``optimizer``.

    Attributes:
        microbatch_size: sequences per microbatch and device.
        length: tokens per sequence.
        without: names of :data:`~vocabpp_jax.pipeline.flags.FLAGS` to leave out.
    """

    pipe: Pipeline
    optimizer: optax.GradientTransformation
    microbatch_size: int
    length: int
    without: tuple[str, ...] = ()

    def report(self, name: str) -> ProgramReport:
        """Compile one of :data:`PROGRAMS` and read the result. Raises ValueError for an unknown name."""
        if name not in PROGRAMS:
            raise ValueError(f"program is {name!r}; the programs are {', '.join(PROGRAMS)}")
        started, read = time.monotonic(), []
        for part in getattr(self, f"_{name}")():
            memory = part.lower().compile().memory_analysis()
            read.append((memory, part.beside))
        return ProgramReport(
            name,
            peak_bytes=max(memory.peak_memory_in_bytes + beside for memory, beside in read),
            temp_bytes=max(memory.temp_size_in_bytes for memory, _ in read),
            output_bytes=max(memory.output_size_in_bytes for memory, _ in read),
            compile_seconds=time.monotonic() - started,
        )

    def compile_step(self) -> tuple[jax.stages.Compiled, float]:
        """The train step, and the seconds spent tracing, lowering and compiling it."""
        started = time.monotonic()
        (step,) = self._step()
        return step.lower().compile(), time.monotonic() - started

    # --- the programs ------------------------------------------------------------------------------------------------

    def _init(self) -> list[Part]:
        layout = self.pipe.layout
        drawing = initialization.programs(layout, self.pipe.mesh)
        one_layer = initialization.layers_of(layout)[0][0]
        blocks = _bytes(self._state.params["blocks"])
        last = blocks - _bytes(self._state.params["blocks"][0][0])
        return [
            Part(lambda: drawing.layer.lower(self._key, one_layer), beside=last),
            Part(lambda: drawing.rest.lower(self._key), beside=blocks),
            *self._import(),
        ]

    def _step(self) -> list[Part]:
        step = training.make_step(self.pipe, self.optimizer, without_flags=self.without)
        return [Part(lambda: step.lower(self._state, self._batch))]

    def _evaluate(self) -> list[Part]:
        evaluate = training.make_evaluation(self.pipe, without_flags=self.without)
        return [Part(lambda: evaluate.lower(self._state.params, self._batch), beside=_bytes(self._state.optimizer))]

    def _save(self) -> list[Part]:
        canonical = self._canonical
        return [
            Part(lambda: canonical.flatten.lower(self._state)),
            Part(lambda: make_fingerprints(canonical.shapes).lower(canonical.shapes), beside=_bytes(self._state)),
        ]

    def _restore(self) -> list[Part]:
        canonical = self._canonical
        return [
            Part(lambda: make_fingerprints(canonical.shapes).lower(canonical.shapes)),
            Part(lambda: canonical.unflatten.lower(canonical.shapes)),
        ]

    def _import(self) -> list[Part]:
        return [Part(lambda: training.make_start(self.pipe, self.optimizer).lower(self._state.params))]

    # --- their arguments ---------------------------------------------------------------------------------------------

    @cached_property
    def _canonical(self) -> Canonical:
        return Canonical(self.pipe, self.optimizer)

    @cached_property
    def _state(self) -> training.State:
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            training.shapes(self.pipe, self.optimizer),
            training.shardings(self.pipe, self.optimizer),
        )

    @property
    def _key(self) -> jax.ShapeDtypeStruct:
        key = jax.eval_shape(lambda: jax.random.key(0))
        return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=NamedSharding(self.pipe.mesh, PartitionSpec()))

    @property
    def _batch(self) -> Batch:
        shape = (self.pipe.schedule.m, self.microbatch_size * self.pipe.mesh.shape[DATA], self.length)
        placed = NamedSharding(self.pipe.mesh, PartitionSpec(None, DATA))
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=placed)
        return {"tokens": tokens, "labels": tokens}


def _bytes(tree: Any) -> int:
    """Bytes that the arrays take on one device."""
    return sum(
        jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype).size * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )
