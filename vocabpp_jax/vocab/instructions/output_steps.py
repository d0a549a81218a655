"""The output layer's steps: S and T, their collectives, and the last stage's G and H.

The schedule decides when a step runs and how far it is from its barrier. Nothing here depends on that, so one set of
steps serves Algorithm 1, Algorithm 2, the three-barrier reference, the interlaced pipeline and the unsharded baseline.
The arithmetic is in :mod:`vocabpp_jax.vocab`.

Shapes, per device: B microbatch, L length, N = (1 + depths)·B·L tokens, D width, R rows of the local shard, K shards.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ... import vocab
from ...pipeline.buffers import Cells, State, get, put, put_if, run_if, zeros
from .. import Coefficients, Kept, Loss, Shard, Stats, Target
from .vocabulary_layer import Collective, Run, Start, VocabularyLayer, flight, send_buffer

F32 = jnp.float32


class OutputSteps(VocabularyLayer):
    """How each step of the output layer updates a device's state."""

    def output_steps(self) -> dict[str, Run | Collective]:
        """The steps by their names in the instruction table."""
        vector_N = jax.ShapeDtypeStruct(self.streams.shape[:1], F32)
        gathered_K3N = jax.ShapeDtypeStruct((self.layout.shards, 3, *vector_N.shape), F32)
        return {
            "S": self.run_S,
            "S1": self.run_S1,
            "S2": self.run_S2,
            "T": self.run_T,
            "G": self.run_G,
            "H": self.run_H,
            "hidden_broadcast": Collective(
                self.start_hidden_broadcast,
                self.done_hidden_broadcast,
                self.streams,
                partial(self._fill_send_buffer, name="hidden_broadcast", read=self._last_stage_output),
                sends=True,
            ),
            "max": Collective(self.start_max, self.done_max, vector_N),
            "stats": Collective(self.start_stats, self.done_stats, gathered_K3N),
            "grad_sum": Collective(
                self.start_grad_sum, self.done_grad_sum, self.summed, self.make_grad_sum, lands_first=True
            ),
        }

    @property
    def summed(self) -> jax.ShapeDtypeStruct:
        """A shard's summand of the input gradient, ``[N, D]``."""
        return jax.ShapeDtypeStruct(self.streams.shape, vocab.summed_dtype(self.dtype))

    @property
    def early(self) -> bool:
        """Whether S computes the input gradient, before the barrier, because its sum starts before T."""
        return self.layout.schedule.sums_before_T

    @property
    def head_gradient(self) -> str:
        """The state entry for the gradient of the head's table."""
        return "grads.embed.tokens" if self.layout.head_is_embedding else "grads.head"

    @property
    def loss(self) -> Loss:
        """The model's loss."""
        return self.layout.model.loss

    @property
    def shard(self) -> Shard:
        """The rows of the head's table on this device."""
        return Shard(self._first_row(self.head), self.layout.model.vocab_size)

    def start_hidden_broadcast(self, state: State, cells: Cells) -> Start:
        return state[send_buffer("hidden_broadcast")], self._broadcast_from(-1)

    def done_hidden_broadcast(self, state: State, cells: Cells, x_ND: jax.Array) -> State:
        return {"X": put_if(state["X"], cells["X"], x_ND)}

    def run_S(self, state: State, cells: Cells) -> State:
        """S: local logits, their exponentials and row statistics; in Algorithm 2 also ``A = P' W``."""

        def update(state: State) -> State:
            kept, stats = self._exponentials(self._logits(state, cells), cells, self.dtype)
            record = get(state["P"], cells["P"]) | {"local": stats}
            if self.trains:
                record |= {"kept": kept}
            state = state | {"P": put(state["P"], cells["P"], record)}
            if not self.early:
                return state
            if kept.slopes_NR is not None:
                state = state | {"uniform": vocab.uniform_input_gradient(self.head, self.shard, kept.slopes_NR)}
            unit_N = vocab.unit(kept.rest_N * state["span"])
            return state | {"A": vocab.in_units(vocab.unscaled_input_gradient(kept, self.head), unit_N, self.dtype)}

        names = ("P", *(("A",) if self.early else ()), *(("uniform",) if "uniform" in state else ()))
        return run_if(cells["microbatch"] >= 0, state, names, update)

    def run_S1(self, state: State, cells: Cells) -> State:
        """S1 of the three-barrier reference: logits, stored in place of the exponentials, and their local maximum."""

        def update(state: State) -> State:
            y_NR, record = self._logits(state, cells), get(state["P"], cells["P"])
            local = record["local"]._replace(maximum=y_NR.max(1))
            record |= {"kept": record["kept"]._replace(p_NR=y_NR), "local": local}
            return state | {"P": put(state["P"], cells["P"], record)}

        return run_if(cells["microbatch"] >= 0, state, ("P",), update)

    def run_S2(self, state: State, cells: Cells) -> State:
        """S2 of the three-barrier reference: exponentials relative to the global maximum, and their local sum."""

        def update(state: State) -> State:
            record = get(state["P"], cells["P"])
            y_NR, maximum_N = record["kept"].p_NR, record["local"].maximum
            kept, local = self._exponentials(y_NR, cells, y_NR.dtype, maximum_N)
            return state | {"P": put(state["P"], cells["P"], record | {"kept": kept, "local": local})}

        return run_if(cells["microbatch"] >= 0, state, ("P",), update)

    def start_max(self, state: State, cells: Cells) -> Start:
        return self._local_stats(state, cells).maximum, partial(lax.pmax, axis_name=self.layout.vocabulary_axes)

    def done_max(self, state: State, cells: Cells, maximum_N: jax.Array) -> State:
        return self._update_record(state, cells, local=self._local_stats(state, cells)._replace(maximum=maximum_N))

    def start_stats(self, state: State, cells: Cells) -> Start:
        # One gather, rather than a maximum and then a sum that has to wait for it.
        return jnp.stack(self._local_stats(state, cells)), self.collectives.gather

    def done_stats(self, state: State, cells: Cells, gathered_K3N: jax.Array) -> State:
        stats_KN = Stats(*jnp.moveaxis(gathered_K3N, 1, 0))
        losses_N = self._weight(cells) * vocab.losses(vocab.combine(stats_KN), self.loss)
        losses_N = jnp.where(cells["microbatch"] >= 0, losses_N, 0)
        updated = {"loss": state["loss"] + losses_N.reshape(1 + self.depths, -1).sum(1)}
        if not self.trains:
            return updated
        vectors = get(state["P"]["kept"]._replace(p_NR=None, slopes_NR=None), jnp.maximum(cells["P"], 0))
        k, rows = lax.axis_index(self.layout.vocabulary_axes), self.head.shape[0]
        coef = vocab.coefficients(stats_KN, k, vectors, self._target(cells), rows)
        return updated | self._update_record(state, cells, coef=coef)

    def run_T(self, state: State, cells: Cells) -> State:
        """T: the weight gradient; in Algorithm 1, after the barrier, also this shard's part of the input gradient."""

        def update(state: State) -> State:
            record = get(state["P"], cells["P"])
            kept, coef, target = record["kept"], record["coef"], self._target(cells)
            total_RD = vocab.weight_gradient(state[self.head_gradient], kept, self._hidden(state, cells), coef, target)
            state = state | {self.head_gradient: total_RD}
            if self.early:
                return state
            dx_ND = vocab.input_gradient(kept, self.head, coef, target, state.get("uniform"))
            return state | {"A": vocab.in_units(dx_ND, self._unit(state, cells), self.dtype)}

        names = (self.head_gradient,) if self.early else (self.head_gradient, "A")
        return run_if(cells["microbatch"] >= 0, state, names, update)

    def make_grad_sum(self, state: State, cells: Cells) -> State:
        """C1 of Algorithm 2: this shard's part of the input gradient. In the other methods T has computed it."""
        if not self.early:
            return state

        def update(state: State) -> State:
            coef, rest_N = get((state["P"]["coef"], state["P"]["kept"].rest_N), cells["P"])
            a_ND = vocab.from_units(state["A"], vocab.unit(rest_N * state["span"]))
            dx_ND = vocab.partial_input_gradient(a_ND, self.head, coef, self._target(cells), state.get("uniform"))
            return state | {"A": vocab.in_units(dx_ND, self._unit(state, cells), self.dtype)}

        return run_if(cells["microbatch"] >= 0, state, ("A",), update)

    def start_grad_sum(self, state: State, cells: Cells) -> Start:
        return state["A"], self._sum_for(-1)

    def done_grad_sum(self, state: State, cells: Cells, g_ND: jax.Array) -> State:
        return {flight("grad_sum"): g_ND}

    def run_G(self, state: State, cells: Cells) -> State:
        """G: the backward of the final function, written to the last stage's inbox."""

        def update(state: State) -> State:
            g_ND = vocab.from_units(state[flight("grad_sum")], self._unit(state, cells)).astype(self.dtype)
            return self._final_vjp(state, cells, get(state["X"], cells["X"]), g_ND)

        return run_if(cells["microbatch"] >= 0, state, (*self._gradient_rings, "grads.final"), update)

    def run_H(self, state: State, cells: Cells) -> State:
        """H: the whole output layer on one device, forward and backward."""

        def update(state: State) -> State:
            x_ND = self._last_stage_output(state, cells).reshape(-1, self.layout.model.width)
            tokens = (self.layout.model.final(self.params["final"], x_ND), self._labels(cells), self._weight(cells))
            losses, gradients, total_RD = [], [], state.get(self.head_gradient)
            for stream in zip(*(jnp.split(a, 1 + self.depths) for a in tokens), strict=True):
                if self.trains:
                    loss, total_RD, g = vocab.whole_layer(stream, self.head, self.shard, total_RD, self.loss)
                    gradients.append(g)
                else:
                    loss = vocab.whole_loss(stream, self.head, self.shard, self.loss)
                losses.append(loss)
            state = state | {"loss": state["loss"] + jnp.stack(losses)}
            if not self.trains:
                return state
            return self._final_vjp(state | {self.head_gradient: total_RD}, cells, x_ND, jnp.concatenate(gradients))

        names = ("loss", *self._gradient_rings, "grads.final", self.head_gradient) if self.trains else ("loss",)
        return run_if(cells["microbatch"] >= 0, state, names, update)

    # --- initial state -----------------------------------------------------------------------------------------------

    def empty_records(self, cells: int, tokens: int) -> State:
        """A ring of the output layer's records, one per microbatch."""
        vector_N = jax.ShapeDtypeStruct((tokens,), F32)
        local = Stats(vector_N, vector_N, vector_N)
        if not self.trains:
            return zeros(cells, {"local": local})
        # The three-barrier reference stores the logits themselves until their maximum is known.
        dtype = F32 if "S1" in self.names else self.dtype
        y_NR = jax.ShapeDtypeStruct((tokens, self.head.shape[0]), F32)
        labels_N = jax.ShapeDtypeStruct((tokens,), jnp.int32)
        kept, _ = jax.eval_shape(
            lambda y_NR, labels_N: vocab.exponentials(y_NR, labels_N, self.shard, dtype, self.loss), y_NR, labels_N
        )
        coef = Coefficients(vector_N, vector_N, vector_N if self.loss.label_smoothing else None)
        return zeros(cells, {"local": local, "kept": kept, "coef": coef})

    def initial_uniform(self, tokens: int) -> State:
        """Label smoothing's part of the input gradient. Without a cap it is constant; with one, every S of Algorithm 2
        computes it, and in the other methods T's matrix includes it."""
        if not self.loss.label_smoothing:
            return {}
        if self.loss.soft_cap is None:
            return {"uniform": vocab.uniform_input_gradient(self.head, self.shard)}
        return {"uniform": jnp.zeros((tokens, self.layout.model.width), F32)} if self.early else {}

    def initial_span(self) -> State:
        """The largest absolute weight of the head's table on any shard, a bound on averages of its rows."""
        return {"span": lax.pmax(jnp.max(jnp.abs(self.head)).astype(F32), self.layout.vocabulary_axes)}

    # --- helpers -----------------------------------------------------------------------------------------------------

    def _final_vjp(self, state: State, cells: Cells, x_ND: jax.Array, g_ND: jax.Array) -> State:
        _, vjp = jax.vjp(self.layout.model.final, self.params["final"], x_ND)
        dfinal, dx_ND = vjp(g_ND)
        dx = dx_ND.reshape(1 + self.depths, *state["inbox"].shape[1:])
        rings = {"inbox": put(state["inbox"], cells["deliver"], dx[0])}
        if self.depths:
            rings["returned"] = put(state["returned"], cells["returned"], dx[1:])
        grads = jax.tree.map(lambda t, d: t + d.astype(F32), state["grads.final"], dfinal)
        return state | rings | {"grads.final": grads}

    @property
    def _gradient_rings(self) -> tuple[str, ...]:
        """The rings that receive the gradient of the last stage's output."""
        return ("inbox", "returned") if self.depths else ("inbox",)

    def _last_stage_output(self, state: State, cells: Cells) -> jax.Array:
        """The last stage's output ``[1 + depths, B, L, D]``."""
        main = get(state["inbox"], cells["inbox"])[None]
        return jnp.concatenate([main, get(state["streams"], cells["streams"])]) if self.depths else main

    def _hidden(self, state: State, cells: Cells) -> jax.Array:
        """The head's input ``[N, D]``, recomputed wherever it is needed so that only the stream is stored."""
        return self.layout.model.final(self.params["final"], get(state["X"], cells["X"]))

    def _logits(self, state: State, cells: Cells) -> jax.Array:
        return vocab.logits(self.head, self._hidden(state, cells), self.shard, self.loss)

    def _exponentials(
        self, y_NR: jax.Array, cells: Cells, dtype: jnp.dtype, maximum_N: jax.Array | None = None
    ) -> tuple[Kept, Stats]:
        return vocab.exponentials(y_NR, self._labels(cells), self.shard, dtype, self.loss, maximum_N)

    def _labels(self, cells: Cells) -> jax.Array:
        return get(self.batch["labels"], jnp.maximum(cells["microbatch"], 0)).reshape(-1)

    def _weight(self, cells: Cells) -> jax.Array:
        return get(self.batch["weight"], jnp.maximum(cells["microbatch"], 0)).reshape(-1)

    def _unit(self, state: State, cells: Cells) -> jax.Array:
        """The unit of each token's input gradient in the sum over shards, ``[N]``; the same on all shards."""
        return vocab.unit(self._weight(cells) * state["span"])

    def _target(self, cells: Cells) -> Target:
        return Target(self._weight(cells), self._labels(cells), self.shard, self.loss)

    def _local_stats(self, state: State, cells: Cells) -> Stats:
        return get(state["P"]["local"], jnp.maximum(cells["P"], 0))

    def _update_record(self, state: State, cells: Cells, **fields: Any) -> State:
        """Replaces some small fields of one microbatch's record."""
        return {"P": state["P"] | {k: put_if(state["P"][k], cells["P"], v) for k, v in fields.items()}}
