"""What the input and output layer's steps share: one device's tables, its batch, and its communication.

Shapes, per device: B microbatch, L length, N tokens (B·L in the input layer, (1 + depths)·B·L in the output layer),
D width, R rows of the local shard.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ...pipeline.buffers import Cells, State, run_if
from ...pipeline.collectives import Native, PermuteTree
from ...pipeline.layout import Layout

Communicate = Callable[[jax.Array], jax.Array]
Start = tuple[jax.Array, Communicate]  # a collective's operand, and the function that communicates it
Run = Callable[[State, Cells], State]


class Collective(NamedTuple):
    """How a collective of the instruction table runs.

    Attributes:
        start: returns the operand, and the function that communicates it.
        done: returns the state entries that the result updates.
        result: shape and dtype of the result.
        make: a pass that computes the operand just before the start, if needed.
        sends: whether the operand is a send buffer in the state, filled by ``make``.
        lands_first: whether the result lands before any pass overwrites the operand. Such passes then wait for the
            landing. Making them wait for the operand, as for other collectives, would keep it alive next to the sum,
            which the backend computes in place. In a schedule where such a pass does run first (gpipe), the compiler
            copies the operand.
    """

    start: Callable[[State, Cells], Start]
    done: Callable[[State, Cells, jax.Array], State]
    result: jax.ShapeDtypeStruct
    make: Run | None = None
    sends: bool = False
    lands_first: bool = False


def flight(name: str) -> str:
    """The state entry of a collective in flight."""
    return f"flight.{name}"


def send_buffer(name: str) -> str:
    """The state entry of a broadcast's send buffer."""
    return f"sent.{name}"


@dataclass(frozen=True)
class VocabularyLayer:
    """One device's part of the vocabulary layers, for one batch.

    Attributes:
        layout: the model, the schedule and the placement of the tables.
        params: this device's ``embed``, ``final`` and, unless it is the embedding, ``head``, as returned by
            :meth:`.Pipeline.rounded`.
        batch: ``tokens`` ``[m, B, L]``; ``labels`` and ``weight`` ``[m, 1 + depths, B, L]`` for the next token and
            each further one. The float32 weight is the mask divided by the global count of valid tokens.
        collectives: how the shards communicate.
    """

    layout: Layout
    params: Any
    batch: dict[str, jax.Array]
    collectives: Native | PermuteTree

    @property
    def trains(self) -> bool:
        """Whether the schedule has a backward."""
        return self.layout.schedule.trains

    @property
    def depths(self) -> int:
        """Tokens predicted beyond the next one. Each adds a stream to every microbatch in the output layer."""
        return self.layout.model.depths

    @property
    def names(self) -> set[str]:
        """Names of the steps in the schedule."""
        return {step.name for step in self.layout.schedule.vocabulary.steps}

    @property
    def stream(self) -> jax.ShapeDtypeStruct:
        """A microbatch between stages as the input layer handles it: ``[B·L, D]``."""
        _, B, L = self.batch["tokens"].shape
        return jax.ShapeDtypeStruct((B * L, self.layout.model.width), self.dtype)

    @property
    def streams(self) -> jax.ShapeDtypeStruct:
        """A microbatch as the output layer handles it, one stream per predicted token: ``[(1 + depths)·B·L, D]``."""
        tokens, width = self.stream.shape
        return jax.ShapeDtypeStruct(((1 + self.depths) * tokens, width), self.dtype)

    @property
    def head(self) -> jax.Array:
        """The table that produces the logits, ``[R, D]``."""
        return self.params["embed"]["tokens"] if self.layout.head_is_embedding else self.params["head"]

    @property
    def dtype(self) -> jnp.dtype:
        """The compute dtype; the head always has it."""
        return self.head.dtype

    def _first_row(self, table_RD: jax.Array) -> jax.Array | int:
        return lax.axis_index(self.layout.vocabulary_axes) * table_RD.shape[0] if self.layout.sharded else 0

    def _fill_send_buffer(
        self, state: State, cells: Cells, name: str, read: Callable[[State, Cells], jax.Array]
    ) -> State:
        """Copies ``read(state, cells)``, ``[..., D]``, into a send buffer if this device's inbox holds something.

        Only the broadcast's source needs valid contents.
        """

        def update(s: State) -> State:
            return s | {send_buffer(name): read(s, cells).reshape(-1, self.layout.model.width)}

        return run_if(cells["inbox"] >= 0, state, (send_buffer(name),), update)

    def _sum_for(self, stage: int, also: int | None = None) -> Communicate:
        """The sum over all shards, readable on the device of ``stage`` and, if given, of stage ``also``."""
        placement = self.layout.schedule.placement
        return partial(self.collectives.total, target=placement[stage], also=None if also is None else placement[also])

    def _broadcast_from(self, stage: int) -> Communicate:
        """Broadcasts one stage's array to all devices."""
        return partial(self.collectives.broadcast, source=self.layout.schedule.placement[stage])
