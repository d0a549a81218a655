"""What the steps of both vocabulary layers share: one device's tables, its batch, and what it sends.

Shapes, per device: B microbatch, L length, N tokens: B·L, or for
the output layer as many for each of 1 + depths streams; D width, R rows of the local shard.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ...pipeline.buffers import Cells, State, when
from ...pipeline.collectives import Native, OfPermutes
from ...pipeline.layout import Layout

Collective = Callable[[jax.Array], jax.Array]
Start = tuple[jax.Array, Collective]  # what a collective takes, and the collective


def flight(name: str) -> str:
    """The state's entry for a collective that is under way."""
    return f"flight.{name}"


def sent(name: str) -> str:
    """The state's entry for what a broadcast sends."""
    return f"sent.{name}"


@dataclass(frozen=True)
class VocabularyLayer:
    """One device's part of the vocabulary layers, for one batch.

    A step ``run X`` is a method ``run_X(state, cells)`` that returns the state after it. A collective is two:
    ``start_X`` returns its operand and what communicates it, ``done_X`` takes what arrived and returns what changes.
    ``make_X``, where there is one, is a pass in front of ``start_X`` that makes the operand.

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
    collectives: Native | OfPermutes

    @property
    def trains(self) -> bool:
        """Whether there is a backward."""
        return self.layout.schedule.trains

    @property
    def depths(self) -> int:
        """Tokens beyond the next that are predicted. The output layer takes so many more streams of a microbatch."""
        return self.layout.model.depths

    @property
    def names(self) -> set[str]:
        """The steps that occur."""
        return {step.name for step in self.layout.schedule.vocabulary.steps}

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

    def _taken(self, state: State, cells: Cells, name: str, taken: Callable[[State], jax.Array]) -> State:
        """Takes what waits in the inbox for a broadcast, ``[..., D]``; meaningful on the device that it comes from."""
        width = self.layout.model.width
        update = lambda s: s | {sent(name): taken(s).reshape(-1, width)}  # noqa: E731
        return when(cells["inbox"] >= 0, state, (sent(name),), update)

    def _sum_for(self, stage: int, also: int | None = None) -> Collective:
        """The sum over all shards, for the device of one stage to read, and another device where one is named."""
        return partial(self.collectives.total, target=self.layout.schedule.placement[stage], also=also)

    def _broadcast_from(self, stage: int) -> Collective:
        """One stage's array on all devices."""
        return partial(self.collectives.broadcast, source=self.layout.schedule.placement[stage])
