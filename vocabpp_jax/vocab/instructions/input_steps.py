"""The input layer's steps: IF, IB and their collectives embed_sum and embed_grad_broadcast.

Shapes, per device: B microbatch, L length, N = B·L tokens, D width, R rows of the local shard.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from ... import vocab
from ...pipeline.buffers import Cells, State, get, passes_wait_for, put, put_if, run_if, wait_for_passes
from ...pipeline.mesh import PIPE
from .vocabulary_layer import Collective, Run, Start, VocabularyLayer, flight, send_buffer


class InputSteps(VocabularyLayer):
    """How each step of the input layer updates a device's state."""

    def input_steps(self) -> dict[str, Run | Collective]:
        """The steps by their names in the instruction table."""
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

    def _lookup(self, table_RD: jax.Array, ids: jax.Array) -> jax.Array:
        """The rows ``ids`` of a table in the compute dtype, zero for rows of other shards."""
        return vocab.lookup(table_RD, ids, self._first_row(table_RD)).astype(self.dtype)

    def _embed(self, tables: dict[str, jax.Array], ids_BL: jax.Array) -> jax.Array:
        """This shard's part of the embedded tokens and positions ``[B, L, D]``; all of it in an unsharded layout."""
        x_BLD = self._lookup(tables["tokens"], ids_BL) * self._scale
        if (positions_RD := tables.get("positions")) is not None:
            x_BLD += self._lookup(positions_RD, jnp.arange(ids_BL.shape[1]))
        return x_BLD

    def _scatter(self, state: State, entries: dict[str, str], ids_BL: jax.Array, g_BLD: jax.Array) -> State:
        """Adds the float32 gradient of the embedded tokens to the state entry of each table."""
        for name, key in entries.items():
            if name == "tokens":
                ids, g = ids_BL, g_BLD * self._scale.astype(jnp.float32)
            else:
                ids, g = jnp.arange(ids_BL.shape[1]), g_BLD.sum(0)
            state = state | {key: vocab.scatter(state[key], ids, self._first_row(self.params["embed"][name]), g)}
        return state

    def _ids(self, microbatch: jax.Array) -> jax.Array:
        """A microbatch's token ids ``[B, L]``."""
        return get(self.batch["tokens"], jnp.maximum(microbatch, 0))

    def run_IF(self, state: State, cells: Cells) -> State:
        """IF: embeds tokens and positions."""
        ids_BL, tables = self._ids(cells["microbatch"]), self.params["embed"]
        if self.layout.sharded:
            # Nothing else orders lookups: XLA would combine the sums of two microbatches of an interval, and fuse a
            # lookup with an update behind later passes. So a lookup waits for the passes before it, and later ones for
            # it: for an element, which the barrier keeps XLA from looking up alone, and which is read before the sum,
            # or the sum, computed in place, would need a copy.
            part_BLD = lax.optimization_barrier(self._embed(tables, wait_for_passes(state, ids_BL)))
            state = passes_wait_for(state, part_BLD)
            return state | {"part": wait_for_passes(state, part_BLD)}
        # Only one device has the unsharded tables; all others would look up zeros.
        return run_if(
            cells["microbatch"] >= 0,
            state,
            ("inbox",),
            lambda s: s | {"inbox": put(s["inbox"], cells["deliver"], self._embed(tables, ids_BL))},
        )

    def start_embed_sum(self, state: State, cells: Cells) -> Start:
        return state["part"].reshape(self.stream.shape), self._sum_for(0, also=-1 if self.depths else None)

    def done_embed_sum(self, state: State, cells: Cells, x_ND: jax.Array) -> State:
        x_BLD = x_ND.reshape(state["inbox"].shape[1:])
        return {ring: put_if(state[ring], cells[key], x_BLD) for ring, key in _CELL_KEYS.items() if key in cells}

    def make_embed_grad_broadcast(self, state: State, cells: Cells) -> State:
        name = "embed_grad_broadcast"
        buffer = send_buffer(name)
        state = self._fill_send_buffer(state, cells, name, lambda s, cells: get(s["inbox"], cells["inbox"]))
        if "behind" not in cells:
            return state

        def update(s: State) -> State:
            g_ND = get(s["behind"], cells["behind"]).reshape(self.stream.shape)
            return s | {buffer: g_ND if self.layout.apart else s[buffer] + g_ND}

        return run_if(cells["behind"] >= 0, state, (buffer,), update)

    def start_embed_grad_broadcast(self, state: State, cells: Cells) -> Start:
        broadcast = self._broadcast_from(0)
        if not (self.depths and self.layout.apart):
            return state[send_buffer("embed_grad_broadcast")], broadcast
        placement = self.layout.schedule.placement
        # The tail's contribution is on the last stage's device. Devices that no pair names receive zeros.
        to_first = [(placement[-1], placement[0])]
        return (
            state[send_buffer("embed_grad_broadcast")],
            lambda g_ND: broadcast(g_ND + lax.ppermute(g_ND, PIPE, to_first)),
        )

    def done_embed_grad_broadcast(self, state: State, cells: Cells, g_ND: jax.Array) -> State:
        return {flight("embed_grad_broadcast"): g_ND}

    def run_IB(self, state: State, cells: Cells) -> State:
        """IB: scatter-adds the first stage's input gradient into this shard's rows."""
        i = cells["microbatch"]
        entries = {name: f"grads.embed.{name}" for name in self.params["embed"]}

        def update(s: State, g: jax.Array) -> State:
            ids_BL = self._ids(i)
            g_BLD = jnp.where(i >= 0, g.reshape(*ids_BL.shape, -1), 0).astype(jnp.float32)
            return self._scatter(s, entries, ids_BL, g_BLD)

        if self.layout.sharded:
            return update(state, state[flight("embed_grad_broadcast")])
        return run_if(i >= 0, state, tuple(entries.values()), lambda s: update(s, get(s["inbox"], cells["inbox"])))

    # --- for a tail after the last stage, with an unsharded vocabulary ------------------------------------------------

    def ahead(self, microbatch: jax.Array) -> jax.Array:
        """A microbatch's embedded tokens ``[B, L, D]``, on the last stage's device."""
        return self._embed(self.params["embed"] | self.params.get("ahead", {}), self._ids(microbatch))

    def ahead_gradient(self, state: State, microbatch: jax.Array, g_BLD: jax.Array) -> State:
        """Adds the gradient of :meth:`ahead`, on the same device."""
        entries = dict(zip(self.params["embed"], self.ahead_gradients, strict=True))
        return self._scatter(state, entries, self._ids(microbatch), g_BLD.astype(jnp.float32))

    @property
    def ahead_gradients(self) -> tuple[str, ...]:
        """The state entries that :meth:`ahead_gradient` adds to, in the order of the tables."""
        parts = {name: "ahead" if name in self.layout.copied else "embed" for name in self.params["embed"]}
        return tuple(f"grads.{part}.{name}" for name, part in parts.items())


_CELL_KEYS = {"inbox": "deliver", "ahead": "ahead"}
"""The rings that receive embedded tokens, and where ``cells`` has the cell of each."""
