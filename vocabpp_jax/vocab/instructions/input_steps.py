"""The steps of the input layer: IF, IB and their collectives embed_sum and embed_grad_broadcast."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ... import vocab
from ...pipeline.buffers import Cells, State, get, put, put_if, run_if
from .vocabulary_layer import Collective, Run, Start, VocabularyLayer, flight


class InputSteps(VocabularyLayer):
    """What each step of the input layer does to a device's state."""

    def input_steps(self) -> dict[str, Run | Collective]:
        """The steps by their names in the table of instructions."""
        return {
            "IF": self.run_IF,
            "IB": self.run_IB,
            "embed_sum": Collective(self.start_embed_sum, self.done_embed_sum, self.stream),
            "embed_grad_broadcast": self._broadcast("embed_grad_broadcast", 0, self.done_embed_grad_broadcast),
        }

    @property
    def _scale(self) -> jax.Array:
        """The factor on embedded tokens, in the compute dtype in both directions."""
        return jnp.asarray(self.layout.model.embed_scale, self.dtype)

    def _read(self, table: jax.Array, ids: jax.Array) -> jax.Array:
        """The rows of this shard among ``ids``, in the compute dtype."""
        return vocab.lookup(table, ids, self._first_row(table)).astype(self.dtype)

    def run_IF(self, state: State, cells: Cells) -> State:
        """IF: this shard's part of the embedded tokens and positions, or all of it where it is not sharded."""
        ids = get(self.batch["tokens"], jnp.maximum(cells["microbatch"], 0))

        def embedded() -> jax.Array:
            x = self._read(self.params["embed"]["tokens"], ids) * self._scale
            if (positions := self.params["embed"].get("positions")) is not None:
                x += self._read(positions, jnp.arange(ids.shape[1]))
            return x

        if self.layout.sharded:
            return state | {"part": embedded()}
        # The unsharded tables are whole on one device only; elsewhere a lookup would be of zeros.
        return run_if(
            cells["microbatch"] >= 0,
            state,
            ("inbox",),
            lambda s: s | {"inbox": put(s["inbox"], cells["deliver"], embedded())},
        )

    def start_embed_sum(self, state: State, cells: Cells) -> Start:
        return state["part"].reshape(-1, self.layout.model.width), self._sum_for(0)

    def done_embed_sum(self, state: State, cells: Cells, x: jax.Array) -> State:
        inbox = state["inbox"]
        return {"inbox": put_if(inbox, cells["deliver"], x.reshape(inbox.shape[1:]))}

    def done_embed_grad_broadcast(self, state: State, cells: Cells, g: jax.Array) -> State:
        return {flight("embed_grad_broadcast"): g}

    def run_IB(self, state: State, cells: Cells) -> State:
        """IB: scatter-adds the first stage's input gradient into this shard's rows."""
        i = cells["microbatch"]

        def scattered(s: State, g: jax.Array) -> State:
            ids = get(self.batch["tokens"], jnp.maximum(i, 0))
            g = jnp.where(i >= 0, g.reshape(*ids.shape, -1), 0).astype(jnp.float32)
            grads = {}
            for name, table in self.params["embed"].items():
                if name == "tokens":
                    at, addend = ids, g * self._scale.astype(jnp.float32)
                else:
                    at, addend = jnp.arange(ids.shape[1]), g.sum(0)
                key = f"grads.embed.{name}"
                grads[key] = vocab.scatter(s[key], at, self._first_row(table), addend)
            return s | grads

        if self.layout.sharded:
            return scattered(state, state[flight("embed_grad_broadcast")])
        names = tuple(f"grads.embed.{name}" for name in self.params["embed"])
        return run_if(i >= 0, state, names, lambda s: scattered(s, get(s["inbox"], cells["inbox"])))
