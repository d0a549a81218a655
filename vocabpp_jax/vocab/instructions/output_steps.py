"""The steps of the output layer: S and T, their collectives, and what the last stage needs of them.

A schedule says when a step runs and how far it is from its barrier; nothing here depends on either, so one set of
steps serves Algorithm 1, Algorithm 2, the three-barrier reference, the interlaced pipeline and the unsharded baseline.
The arithmetic is in :mod:`vocabpp_jax.vocab`.
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
from .vocabulary_layer import Collective, Run, Start, VocabularyLayer, flight, sent

F32 = jnp.float32


class OutputSteps(VocabularyLayer):
    """What each step of the output layer does to a device's state."""

    def output_steps(self) -> dict[str, Run | Collective]:
        """The steps by their names in the table of instructions."""
        vector = jax.ShapeDtypeStruct(self.streams.shape[:1], F32)
        gathered = jax.ShapeDtypeStruct((self.layout.shards, 3, *vector.shape), F32)
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
                partial(self._copied, name="hidden_broadcast", waiting=self._waiting),
                sends=True,
            ),
            "max": Collective(self.start_max, self.done_max, vector),
            "stats": Collective(self.start_stats, self.done_stats, gathered),
            "grad_sum": Collective(
                self.start_grad_sum, self.done_grad_sum, self.summed, self.make_grad_sum, lands_first=True
            ),
        }

    @property
    def summed(self) -> jax.ShapeDtypeStruct:
        """What a shard puts into the sum of the input gradient."""
        return jax.ShapeDtypeStruct(self.streams.shape, vocab.summed_dtype(self.dtype))

    @property
    def early(self) -> bool:
        """Whether the input gradient is computed before the barrier, in S, because its sum starts before T."""
        return self.layout.schedule.sums_before_T

    @property
    def head_gradient(self) -> str:
        """The state's entry for the gradient of the table that makes the logits."""
        return "grads.embed.tokens" if self.layout.head_is_embedding else "grads.head"

    @property
    def loss(self) -> Loss:
        """What is minimised."""
        return self.layout.model.loss

    @property
    def shard(self) -> Shard:
        """The rows of the head's table that this device holds."""
        return Shard(self._first_row(self.head), self.layout.model.vocab_size)

    def start_hidden_broadcast(self, state: State, cells: Cells) -> Start:
        return state[sent("hidden_broadcast")], self._broadcast_from(-1)

    def done_hidden_broadcast(self, state: State, cells: Cells, x: jax.Array) -> State:
        return {"X": put_if(state["X"], cells["X"], x)}

    def run_S(self, state: State, cells: Cells) -> State:
        """S: local logits, their exponentials and row statistics; in Algorithm 2 also ``A = P' W``."""

        def passed(state: State) -> State:
            kept, stats = self._exponentials(self._logits(state, cells), cells, self.dtype)
            record = get(state["P"], cells["P"]) | {"local": stats}
            if self.trains:
                record |= {"kept": kept}
            state = state | {"P": put(state["P"], cells["P"], record)}
            if not self.early:
                return state
            if kept.slopes is not None:
                state = state | {"uniform": vocab.uniform_input_gradient(self.head, self.shard, kept.slopes)}
            unit = vocab.unit(kept.rest * state["span"])
            return state | {"A": vocab.in_units(vocab.unscaled_input_gradient(kept, self.head), unit, self.dtype)}

        names = ("P", *(("A",) if self.early else ()), *(("uniform",) if "uniform" in state else ()))
        return run_if(cells["microbatch"] >= 0, state, names, passed)

    def run_S1(self, state: State, cells: Cells) -> State:
        """S1 of the three-barrier reference: logits, where S2 will put exponentials, and their local maximum."""

        def passed(state: State) -> State:
            y, record = self._logits(state, cells), get(state["P"], cells["P"])
            record |= {"kept": record["kept"]._replace(p=y), "local": record["local"]._replace(maximum=y.max(1))}
            return state | {"P": put(state["P"], cells["P"], record)}

        return run_if(cells["microbatch"] >= 0, state, ("P",), passed)

    def run_S2(self, state: State, cells: Cells) -> State:
        """S2 of the three-barrier reference: exponentials below the global maximum, and their local sum."""

        def passed(state: State) -> State:
            record = get(state["P"], cells["P"])
            y, maximum = record["kept"].p, record["local"].maximum
            kept, local = self._exponentials(y, cells, y.dtype, maximum)
            return state | {"P": put(state["P"], cells["P"], record | {"kept": kept, "local": local})}

        return run_if(cells["microbatch"] >= 0, state, ("P",), passed)

    def start_max(self, state: State, cells: Cells) -> Start:
        return self._local(state, cells).maximum, partial(lax.pmax, axis_name=self.layout.vocabulary_axes)

    def done_max(self, state: State, cells: Cells, maximum: jax.Array) -> State:
        return self._with_record(state, cells, local=self._local(state, cells)._replace(maximum=maximum))

    def start_stats(self, state: State, cells: Cells) -> Start:
        # One gather instead of a maximum that a sum must wait for.
        return jnp.stack(self._local(state, cells)), self.collectives.gather

    def done_stats(self, state: State, cells: Cells, gathered: jax.Array) -> State:
        of_shards = Stats(*jnp.moveaxis(gathered, 1, 0))
        weighted = self._weight(cells) * vocab.losses(vocab.combine(of_shards), self.loss)
        weighted = jnp.where(cells["microbatch"] >= 0, weighted, 0)
        updated = {"loss": state["loss"] + weighted.reshape(1 + self.depths, -1).sum(1)}
        if not self.trains:
            return updated
        vectors = get(state["P"]["kept"]._replace(p=None, slopes=None), jnp.maximum(cells["P"], 0))
        mine, rows = lax.axis_index(self.layout.vocabulary_axes), self.head.shape[0]
        at = vocab.coefficients(of_shards, mine, vectors, self._target(cells), rows)
        return updated | self._with_record(state, cells, at=at)

    def run_T(self, state: State, cells: Cells) -> State:
        """T: the weight gradient; behind the barrier (Algorithm 1) also this shard's part of the input gradient."""

        def passed(state: State) -> State:
            record = get(state["P"], cells["P"])
            kept, at, target = record["kept"], record["at"], self._target(cells)
            total = vocab.weight_gradient(state[self.head_gradient], kept, self._hidden(state, cells), at, target)
            state = state | {self.head_gradient: total}
            if self.early:
                return state
            part = vocab.input_gradient(kept, self.head, at, target, state.get("uniform"))
            return state | {"A": vocab.in_units(part, self._unit(state, cells), self.dtype)}

        names = (self.head_gradient,) if self.early else (self.head_gradient, "A")
        return run_if(cells["microbatch"] >= 0, state, names, passed)

    def make_grad_sum(self, state: State, cells: Cells) -> State:
        """C1 of Algorithm 2: this shard's part of the input gradient; T has made it in the others."""
        if not self.early:
            return state

        def passed(state: State) -> State:
            at, rest = get((state["P"]["at"], state["P"]["kept"].rest), cells["P"])
            a = vocab.from_units(state["A"], vocab.unit(rest * state["span"]))
            part = vocab.partial_input_gradient(a, self.head, at, self._target(cells), state.get("uniform"))
            return state | {"A": vocab.in_units(part, self._unit(state, cells), self.dtype)}

        return run_if(cells["microbatch"] >= 0, state, ("A",), passed)

    def start_grad_sum(self, state: State, cells: Cells) -> Start:
        return state["A"], self._sum_for(-1)

    def done_grad_sum(self, state: State, cells: Cells, g: jax.Array) -> State:
        return {flight("grad_sum"): g}

    def run_G(self, state: State, cells: Cells) -> State:
        """G: the final function's backward, into the last stage's inbox."""

        def passed(state: State) -> State:
            g = vocab.from_units(state[flight("grad_sum")], self._unit(state, cells)).astype(self.dtype)
            return self._final_vjp(state, cells, get(state["X"], cells["X"]), g)

        return run_if(cells["microbatch"] >= 0, state, (*self._returns, "grads.final"), passed)

    def run_H(self, state: State, cells: Cells) -> State:
        """H: the whole output layer on one device, forward and backward."""

        def passed(state: State) -> State:
            x = self._waiting(state, cells).reshape(-1, self.layout.model.width)
            tokens = (self.layout.model.final(self.params["final"], x), self._labels(cells), self._weight(cells))
            losses, gradients, total = [], [], state.get(self.head_gradient)
            for stream in zip(*(jnp.split(a, 1 + self.depths) for a in tokens), strict=True):
                if self.trains:
                    loss, total, dx = vocab.whole_layer(stream, self.head, self.shard, total, self.loss)
                    gradients.append(dx)
                else:
                    loss = vocab.whole_loss(stream, self.head, self.shard, self.loss)
                losses.append(loss)
            state = state | {"loss": state["loss"] + jnp.stack(losses)}
            if not self.trains:
                return state
            return self._final_vjp(state | {self.head_gradient: total}, cells, x, jnp.concatenate(gradients))

        names = ("loss", *self._returns, "grads.final", self.head_gradient) if self.trains else ("loss",)
        return run_if(cells["microbatch"] >= 0, state, names, passed)

    # --- what the loss's extensions add to the state -----------------------------------------------------------------

    def empty_records(self, cells: int, tokens: int) -> State:
        """A ring of what the output layer keeps of a microbatch."""
        vector = jax.ShapeDtypeStruct((tokens,), F32)
        local = Stats(vector, vector, vector)
        if not self.trains:
            return zeros(cells, {"local": local})
        # The three-barrier reference keeps the logits themselves until it knows their maximum.
        dtype = F32 if "S1" in self.names else self.dtype
        y = jax.ShapeDtypeStruct((tokens, self.head.shape[0]), F32)
        labels = jax.ShapeDtypeStruct((tokens,), jnp.int32)
        kept, _ = jax.eval_shape(
            lambda y, labels: vocab.exponentials(y, labels, self.shard, dtype, self.loss), y, labels
        )
        at = Coefficients(vector, vector, vector if self.loss.label_smoothing else None)
        return zeros(cells, {"local": local, "kept": kept, "at": at})

    def initial_uniform(self, tokens: int) -> State:
        """Label smoothing's part of the input gradient: known at once without a cap; with one every S makes it in
        Algorithm 2, and T has it in its matrix in the others."""
        if not self.loss.label_smoothing:
            return {}
        if self.loss.soft_cap is None:
            return {"uniform": vocab.uniform_input_gradient(self.head, self.shard)}
        return {"uniform": jnp.zeros((tokens, self.layout.model.width), F32)} if self.early else {}

    def initial_span(self) -> State:
        """The largest weight of the head's table on any shard: no element of an average of its rows is larger."""
        return {"span": lax.pmax(jnp.max(jnp.abs(self.head)).astype(F32), self.layout.vocabulary_axes)}

    # --- pieces ------------------------------------------------------------------------------------------------------

    def _final_vjp(self, state: State, cells: Cells, x: jax.Array, g: jax.Array) -> State:
        _, vjp = jax.vjp(self.layout.model.final, self.params["final"], x)
        dfinal, dx = vjp(g)
        dx = dx.reshape(1 + self.depths, *state["inbox"].shape[1:])
        returned = {"inbox": put(state["inbox"], cells["deliver"], dx[0])}
        if self.depths:
            returned["returned"] = put(state["returned"], cells["returned"], dx[1:])
        grads = jax.tree.map(lambda t, d: t + d.astype(F32), state["grads.final"], dfinal)
        return state | returned | {"grads.final": grads}

    @property
    def _returns(self) -> tuple[str, ...]:
        """Where the gradients of the last stage's output go."""
        return ("inbox", "returned") if self.depths else ("inbox",)

    def _waiting(self, state: State, cells: Cells) -> jax.Array:
        """The last stage's output ``[1 + depths, B, L, D]``."""
        main = get(state["inbox"], cells["inbox"])[None]
        return jnp.concatenate([main, get(state["streams"], cells["streams"])]) if self.depths else main

    def _hidden(self, state: State, cells: Cells) -> jax.Array:
        """The head's input ``[N, D]``: computed again wherever it is needed, so that only the stream is stored."""
        return self.layout.model.final(self.params["final"], get(state["X"], cells["X"]))

    def _logits(self, state: State, cells: Cells) -> jax.Array:
        return vocab.logits(self.head, self._hidden(state, cells), self.shard, self.loss)

    def _exponentials(
        self, y: jax.Array, cells: Cells, dtype: jnp.dtype, maximum: jax.Array | None = None
    ) -> tuple[Kept, Stats]:
        return vocab.exponentials(y, self._labels(cells), self.shard, dtype, self.loss, maximum)

    def _labels(self, cells: Cells) -> jax.Array:
        return get(self.batch["labels"], jnp.maximum(cells["microbatch"], 0)).reshape(-1)

    def _weight(self, cells: Cells) -> jax.Array:
        return get(self.batch["weight"], jnp.maximum(cells["microbatch"], 0)).reshape(-1)

    def _unit(self, state: State, cells: Cells) -> jax.Array:
        """What a token's input gradient is summed in units of, the same on all shards."""
        return vocab.unit(self._weight(cells) * state["span"])

    def _target(self, cells: Cells) -> Target:
        return Target(self._weight(cells), self._labels(cells), self.shard, self.loss)

    def _local(self, state: State, cells: Cells) -> Stats:
        return get(state["P"]["local"], jnp.maximum(cells["P"], 0))

    def _with_record(self, state: State, cells: Cells, **fields: Any) -> State:
        """The record of one microbatch with some small fields replaced."""
        return {"P": state["P"] | {k: put_if(state["P"][k], cells["P"], v) for k, v in fields.items()}}
