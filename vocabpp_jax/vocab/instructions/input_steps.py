"""The steps of the input layer: IF, IB and their collectives embed_sum and embed_grad_broadcast."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from ... import vocab
from ...pipeline.buffers import Cells, State, get, put, put_if, run_if
from ...pipeline.mesh import PIPE
from .vocabulary_layer import Collective, Run, Start, VocabularyLayer, flight, sent


class InputSteps(VocabularyLayer):
    """What each step of the input layer does to a device's state."""

    def input_steps(self) -> dict[str, Run | Collective]:
        """The steps by their names in the table of instructions."""
        return {
            "IF": self.run_IF,
            "IB": self.run_IB,
            "embed_sum": Collective(self.start_embed_sum, self.done_embed_sum, self.stream),
            "embed_grad_broadcast": Collective(
                self.start_embed_grad_broadcast,
                self.done_embed_grad_broadcast,
                self.stream,
                self.make_embed_grad_broadcast,
                sends=True,
            ),
        }

    @property
    def _scale(self) -> jax.Array:
        """The factor on embedded tokens, in the compute dtype in both directions."""
        return jnp.asarray(self.layout.model.embed_scale, self.dtype)

    def _read(self, table: jax.Array, ids: jax.Array) -> jax.Array:
        """The rows of this shard among ``ids``, in the compute dtype."""
        return vocab.lookup(table, ids, self._first_row(table)).astype(self.dtype)

    def _embedded(self, tables: dict[str, jax.Array], ids: jax.Array) -> jax.Array:
        """This shard's part of the embedded tokens and positions, or all of it where it is not sharded."""
        x = self._read(tables["tokens"], ids) * self._scale
        if (positions := tables.get("positions")) is not None:
            x += self._read(positions, jnp.arange(ids.shape[1]))
        return x

    def _scattered(self, state: State, entries: dict[str, str], ids: jax.Array, g: jax.Array) -> State:
        """Adds the gradient ``g [B, L, D]`` of embedded tokens, float32, to the state's entry for each table."""
        for name, key in entries.items():
            if name == "tokens":
                at, addend = ids, g * self._scale.astype(jnp.float32)
            else:
                at, addend = jnp.arange(ids.shape[1]), g.sum(0)
            state = state | {key: vocab.scatter(state[key], at, self._first_row(self.params["embed"][name]), addend)}
        return state

    def _ids(self, microbatch: jax.Array) -> jax.Array:
        return get(self.batch["tokens"], jnp.maximum(microbatch, 0))

    def run_IF(self, state: State, cells: Cells) -> State:
        """IF: the embedded tokens and positions."""
        ids, tables = self._ids(cells["microbatch"]), self.params["embed"]
        if self.layout.sharded:
            return state | {"part": self._embedded(tables, ids)}
        # The unsharded tables are whole on one device only; elsewhere a lookup would be of zeros.
        return run_if(
            cells["microbatch"] >= 0,
            state,
            ("inbox",),
            lambda s: s | {"inbox": put(s["inbox"], cells["deliver"], self._embedded(tables, ids))},
        )

    def start_embed_sum(self, state: State, cells: Cells) -> Start:
        return state["part"].reshape(self.stream.shape), self._sum_for(0, also=-1 if self.depths else None)

    def done_embed_sum(self, state: State, cells: Cells, x: jax.Array) -> State:
        x = x.reshape(state["inbox"].shape[1:])
        return {ring: put_if(state[ring], cells[at], x) for ring, at in _ARRIVES.items() if at in cells}

    def make_embed_grad_broadcast(self, state: State, cells: Cells) -> State:
        name = "embed_grad_broadcast"
        state = self._copied(state, cells, name, lambda s, cells: get(s["inbox"], cells["inbox"]))
        if "behind" not in cells:
            return state

        def joined(s: State) -> State:
            g = get(s["behind"], cells["behind"]).reshape(self.stream.shape)
            return s | {sent(name): g if self.layout.apart else s[sent(name)] + g}

        return run_if(cells["behind"] >= 0, state, (sent(name),), joined)

    def start_embed_grad_broadcast(self, state: State, cells: Cells) -> Start:
        broadcast = self._broadcast_from(0)
        if not (self.depths and self.layout.apart):
            return state[sent("embed_grad_broadcast")], broadcast
        placement = self.layout.schedule.placement
        # What the tail has to add is on the last stage's device. Where nothing is sent, zeros arrive.
        to_first = [(placement[-1], placement[0])]
        return state[sent("embed_grad_broadcast")], lambda g: broadcast(g + lax.ppermute(g, PIPE, to_first))

    def done_embed_grad_broadcast(self, state: State, cells: Cells, g: jax.Array) -> State:
        return {flight("embed_grad_broadcast"): g}

    def run_IB(self, state: State, cells: Cells) -> State:
        """IB: scatter-adds the first stage's input gradient into this shard's rows."""
        i = cells["microbatch"]
        entries = {name: f"grads.embed.{name}" for name in self.params["embed"]}

        def scattered(s: State, g: jax.Array) -> State:
            ids = self._ids(i)
            g = jnp.where(i >= 0, g.reshape(*ids.shape, -1), 0).astype(jnp.float32)
            return self._scattered(s, entries, ids, g)

        if self.layout.sharded:
            return scattered(state, state[flight("embed_grad_broadcast")])
        return run_if(i >= 0, state, tuple(entries.values()), lambda s: scattered(s, get(s["inbox"], cells["inbox"])))

    # --- for a tail behind the last stage, where the vocabulary is not sharded ----------------------------------------

    def ahead(self, microbatch: jax.Array) -> jax.Array:
        """The embedded tokens ``[B, L, D]`` of a microbatch, on the last stage's device."""
        return self._embedded(self.params["embed"] | self.params.get("ahead", {}), self._ids(microbatch))

    def ahead_gradient(self, state: State, microbatch: jax.Array, g: jax.Array) -> State:
        """Adds their gradient ``[B, L, D]``, there too."""
        entries = dict(zip(self.params["embed"], self.ahead_gradients, strict=True))
        return self._scattered(state, entries, self._ids(microbatch), g.astype(jnp.float32))

    @property
    def ahead_gradients(self) -> tuple[str, ...]:
        """The state's entries that :meth:`ahead_gradient` adds to, in the order of the tables."""
        where = {name: "ahead" if name in self.layout.copied else "embed" for name in self.params["embed"]}
        return tuple(f"grads.{part}.{name}" for name, part in where.items())


_ARRIVES = {"inbox": "deliver", "ahead": "ahead"}
"""Where the embedded tokens go, and the table of the cell."""
