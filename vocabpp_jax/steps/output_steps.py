"""The steps of the output layer: S and T, their collectives C0, stats and big, and what the last stage needs of them.

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

from .. import vocab
from ..layout import PIPE
from ..rings import Cells, State, get, put, put_if, when
from ..schedules import sums_before_T
from ..vocab import Shard, Stats
from .layer import Start, VocabularyLayer, flight, sum_over_shards

F32 = jnp.float32


class OutputSteps(VocabularyLayer):
    """What each step of the output layer does to a device's state."""

    @property
    def early(self) -> bool:
        """Whether the input gradient is computed before the barrier, in S, because its sum starts before T."""
        return sums_before_T(self.layout.schedule)

    @property
    def head_gradient(self) -> str:
        """The state's entry for the gradient of the table that makes the logits."""
        return "grads.embed.tokens" if self.layout.head_is_embedding else "grads.head"

    @property
    def head(self) -> jax.Array:
        """The table that makes the logits, ``[R, D]``."""
        return self.params["embed"]["tokens"] if self.layout.head_is_embedding else self.params["head"]

    @property
    def shard(self) -> Shard:
        """The rows of the head's table that this device holds."""
        return Shard(self._first_row(self.head), self.layout.model.vocab_size)

    def start_C0(self, state: State, cells: Cells) -> Start:
        return self._stream(state, cells), self._broadcast_from(-1)

    def done_C0(self, state: State, cells: Cells, x: jax.Array) -> State:
        return {"X": put_if(state["X"], cells["X"], x)}

    def run_S(self, state: State, cells: Cells) -> State:
        """S: local logits and softmax; in Algorithm 2 also ``A = P' W``."""

        def passed(state: State) -> State:
            y = vocab.logits(self.head, self._hidden(state, cells), self.shard)
            p, stats = vocab.local_softmax(y, self._labels(cells), self.shard, self.head.dtype)
            record = get(state["P"], cells["P"]) | {"local": stats}
            if self.trains:
                record |= {"softmax": p}
            state = state | {"P": put(state["P"], cells["P"], record)}
            return state | {"A": vocab.unscaled_input_gradient(p, self.head)} if self.early else state

        names = ("P", "A") if self.early else ("P",)
        return when(cells["microbatch"] >= 0, state, names, passed)

    def run_S1(self, state: State, cells: Cells) -> State:
        """S1 of the three-barrier reference: logits and their local maximum."""

        def passed(state: State) -> State:
            y = vocab.logits(self.head, self._hidden(state, cells), self.shard)
            target = vocab.target_logits(y, self._labels(cells), self.shard)
            local = Stats(jnp.max(y, axis=1), jnp.zeros_like(target), target)
            record = get(state["P"], cells["P"]) | {"softmax": y, "local": local}
            return state | {"P": put(state["P"], cells["P"], record)}

        return when(cells["microbatch"] >= 0, state, ("P",), passed)

    def run_S2(self, state: State, cells: Cells) -> State:
        """S2 of the three-barrier reference: exponentials below the global maximum, and their local sum."""

        def passed(state: State) -> State:
            record = get(state["P"], cells["P"])
            local = record["local"]
            e = jnp.exp(record["softmax"] - local.maximum[:, None])
            record |= {"softmax": e, "local": local._replace(sum=e.sum(1))}
            return state | {"P": put(state["P"], cells["P"], record)}

        return when(cells["microbatch"] >= 0, state, ("P",), passed)

    def start_max(self, state: State, cells: Cells) -> Start:
        return self._local(state, cells).maximum, partial(lax.pmax, axis_name=PIPE)

    def done_max(self, state: State, cells: Cells, maximum: jax.Array) -> State:
        return self._noted(state, cells, local=self._local(state, cells)._replace(maximum=maximum))

    def start_stats(self, state: State, cells: Cells) -> Start:
        # One gather instead of a maximum that a sum must wait for.
        return jnp.stack(self._local(state, cells)), partial(lax.all_gather, axis_name=PIPE)

    def done_stats(self, state: State, cells: Cells, gathered: jax.Array) -> State:
        whole = vocab.combine(Stats(*jnp.moveaxis(gathered, 1, 0)))
        loss = jnp.sum(jnp.where(cells["microbatch"] >= 0, self._weight(cells) * vocab.losses(whole), 0))
        updated = {"loss": state["loss"] + loss}
        if not self.trains:
            return updated
        local = self._local(state, cells)
        scale = 1 / whole.sum if "S1" in self.names else vocab.factor(local, whole)
        return updated | self._noted(state, cells, factor=scale)

    def run_T(self, state: State, cells: Cells) -> State:
        """T: the weight gradient; behind the barrier (Algorithm 1) also this shard's part of the input gradient."""

        def passed(state: State) -> State:
            record = get(state["P"], cells["P"])
            dy = vocab.logit_gradient(
                record["softmax"], record["factor"], self._weight(cells), self._labels(cells), self.shard
            )
            dy = dy.astype(self.head.dtype)
            total = vocab.weight_gradient(state[self.head_gradient], dy, self._hidden(state, cells))
            state = state | {self.head_gradient: total}
            return state if self.early else state | {"A": vocab.input_gradient(dy, self.head)}

        names = (self.head_gradient,) if self.early else (self.head_gradient, "A")
        return when(cells["microbatch"] >= 0, state, names, passed)

    def start_big(self, state: State, cells: Cells) -> Start:
        part = state["A"]
        if self.early:
            scale = get(state["P"]["factor"], jnp.maximum(cells["P"], 0))
            part = vocab.partial_input_gradient(
                part, self.head, scale, self._weight(cells), self._labels(cells), self.shard
            )
        return part, sum_over_shards

    def done_big(self, state: State, cells: Cells, g: jax.Array) -> State:
        # The parts are spent. Forgotten, they are summed in place.
        return {flight("big"): g, "A": g}

    def run_G(self, state: State, cells: Cells) -> State:
        """G: the final function's backward, into the last stage's inbox."""

        def passed(state: State) -> State:
            return self._final_vjp(state, cells, get(state["X"], cells["X"]), state[flight("big")])

        return when(cells["microbatch"] >= 0, state, ("inbox", "grads.final"), passed)

    def run_H(self, state: State, cells: Cells) -> State:
        """H: the whole output layer on one device, forward and backward."""

        def passed(state: State) -> State:
            x = get(state["inbox"], cells["inbox"]).reshape(-1, self.layout.model.width)
            hidden, labels, weight = (
                self.layout.model.final(self.params["final"], x),
                self._labels(cells),
                self._weight(cells),
            )
            if not self.trains:
                return state | {
                    "loss": state["loss"] + vocab.unsharded_loss(hidden, self.head, labels, weight, self.shard)
                }
            total = state[self.head_gradient]
            loss, total, dx = vocab.unsharded(hidden, self.head, labels, weight, self.shard, total)
            state = state | {"loss": state["loss"] + loss, self.head_gradient: total}
            return self._final_vjp(state, cells, x, dx)

        names = ("loss", "inbox", "grads.final", self.head_gradient) if self.trains else ("loss",)
        return when(cells["microbatch"] >= 0, state, names, passed)

    # --- pieces ------------------------------------------------------------------------------------------------------

    def _final_vjp(self, state: State, cells: Cells, x: jax.Array, g: jax.Array) -> State:
        _, vjp = jax.vjp(self.layout.model.final, self.params["final"], x)
        dfinal, dx = vjp(g)
        inbox = put(state["inbox"], cells["deliver"], dx.reshape(state["inbox"].shape[1:]))
        grads = jax.tree.map(lambda t, d: t + d.astype(F32), state["grads.final"], dfinal)
        return state | {"inbox": inbox, "grads.final": grads}

    def _hidden(self, state: State, cells: Cells) -> jax.Array:
        """The head's input ``[N, D]``: computed again wherever it is needed, so that only the stream is stored."""
        return self.layout.model.final(self.params["final"], get(state["X"], cells["X"]))

    def _labels(self, cells: Cells) -> jax.Array:
        return get(self.batch["labels"], jnp.maximum(cells["microbatch"], 0)).reshape(-1)

    def _weight(self, cells: Cells) -> jax.Array:
        return get(self.batch["weight"], jnp.maximum(cells["microbatch"], 0)).reshape(-1)

    def _local(self, state: State, cells: Cells) -> Stats:
        return get(state["P"]["local"], jnp.maximum(cells["P"], 0))

    def _noted(self, state: State, cells: Cells, **fields: Any) -> State:
        """The record of one microbatch with some small fields replaced."""
        return {"P": state["P"] | {k: put_if(state["P"][k], cells["P"], v) for k, v in fields.items()}}
