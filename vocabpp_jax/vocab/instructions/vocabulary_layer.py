"""What the steps of both vocabulary layers share: one device's tables, its batch, and what it sends.

Shapes, per device: B microbatch, L length, N = B·L tokens, D width, R rows of the local shard.
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
Start = tuple[jax.Array, Communicate]  # what a collective takes, and what communicates it
Run = Callable[[State, Cells], State]


class Collective(NamedTuple):
    """What a collective of the table of instructions does.

    Attributes:
        start: its operand, and what communicates it.
        done: the entries of the state that change with its result.
        result: shape and dtype of that.
        make: a pass in front that makes the operand, if it needs one.
        sends: whether it sends what ``make`` left in the state for it.
        lands_first: whether it lands before any pass replaces its operand. The landing holds those passes back; to read
            the operand for that, as of other collectives, would keep it alive beside the sum that the backend makes in
            its place. In a schedule where such a pass does come first (gpipe), the compiler copies the operand.
    """

    start: Callable[[State, Cells], Start]
    done: Callable[[State, Cells, jax.Array], State]
    result: jax.ShapeDtypeStruct
    make: Run | None = None
    sends: bool = False
    lands_first: bool = False


def flight(name: str) -> str:
    """The state's entry for a collective that is under way."""
    return f"flight.{name}"


def sent(name: str) -> str:
    """The state's entry for what a broadcast sends."""
    return f"sent.{name}"


@dataclass(frozen=True)
class VocabularyLayer:
    """One device's part of the vocabulary layers, for one batch.

    Attributes:
        layout: the model, the schedule, and where the tables are.
        params: this device's ``embed``, ``final`` and, where it is not the embedding, ``head``, as
            :meth:`.Pipeline.rounded` leaves them.
        batch: ``tokens`` ``[m, B, L]``; ``labels`` and ``weight`` ``[m, 1 + depths, B, L]`` for the next token and
            each further one, the weight in float32: the mask over the global count of valid tokens.
        collectives: how the shards communicate.
    """

    layout: Layout
    params: Any
    batch: dict[str, jax.Array]
    collectives: Native | PermuteTree

    @property
    def trains(self) -> bool:
        """Whether there is a backward."""
        return self.layout.schedule.trains

    @property
    def depths(self) -> int:
        """Tokens beyond the next that are predicted: the output layer takes so many more streams of a microbatch."""
        return self.layout.model.depths

    @property
    def names(self) -> set[str]:
        """The steps that occur."""
        return {step.name for step in self.layout.schedule.vocabulary.steps}

    @property
    def stream(self) -> jax.ShapeDtypeStruct:
        """A microbatch between stages, as the vocabulary layers have it, ``[N, D]``."""
        _, B, L = self.batch["tokens"].shape
        return jax.ShapeDtypeStruct((B * L, self.layout.model.width), self.dtype)

    @property
    def streams(self) -> jax.ShapeDtypeStruct:
        """What the output layer takes of it: as many tokens again for each further one, ``[(1 + depths) N, D]``."""
        tokens, width = self.stream.shape
        return jax.ShapeDtypeStruct(((1 + self.depths) * tokens, width), self.dtype)

    @property
    def head(self) -> jax.Array:
        """The table that makes the logits, ``[R, D]``."""
        return self.params["embed"]["tokens"] if self.layout.head_is_embedding else self.params["head"]

    @property
    def dtype(self) -> jnp.dtype:
        """The compute dtype, which the head is always in."""
        return self.head.dtype

    def _first_row(self, table: jax.Array) -> jax.Array | int:
        return lax.axis_index(self.layout.vocabulary_axes) * table.shape[0] if self.layout.sharded else 0

    def _copied(self, state: State, cells: Cells, name: str, waiting: Callable[[State, Cells], jax.Array]) -> State:
        """Takes what waits in the inbox, ``[..., D]``; meaningful on the device that it is broadcast from."""

        def taken(s: State) -> State:
            return s | {sent(name): waiting(s, cells).reshape(-1, self.layout.model.width)}

        return run_if(cells["inbox"] >= 0, state, (sent(name),), taken)

    def _sum_for(self, stage: int, also: int | None = None) -> Communicate:
        """The sum over all shards, for the device of one stage to read, and of another where one is given."""
        placement = self.layout.schedule.placement
        return partial(self.collectives.total, target=placement[stage], also=None if also is None else placement[also])

    def _broadcast_from(self, stage: int) -> Communicate:
        """One stage's array on all devices."""
        return partial(self.collectives.broadcast, source=self.layout.schedule.placement[stage])
