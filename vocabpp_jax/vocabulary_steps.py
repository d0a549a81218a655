"""What each instruction of the vocabulary layers does to a device's state.

The names are those of :mod:`vocabpp_jax.schedules.vocabulary`; the arithmetic is in :mod:`vocabpp_jax.vocab`. A
schedule says when a step runs and how far it is from its barrier; nothing here depends on either, so one set of steps
serves Algorithm 1, Algorithm 2, the three-barrier reference, the interlaced pipeline and the unsharded baseline.

Shapes, per device: B microbatch, L length, N = B·L tokens, D width, R rows of the local shard.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import vocab
from .layout import PIPE, Layout
from .rings import Cells, State, before_later_passes, behind_earlier_passes, get, put, put_if, when
from .schedules import Instruction
from .vocab import Shard, Stats

F32 = jnp.float32
Start = tuple[Any, Callable]  # what a collective takes, and the collective


def flight(name: str) -> str:
    """The state's entry for a collective that is under way."""
    return f"flight.{name}"


@dataclass(frozen=True)
class VocabularySteps:
    """The vocabulary layers of one device, for one batch.

    Attributes:
        layout: the model, the schedule, and where the tables are.
        params: this device's ``embed``, ``final`` and, where it is not the embedding, ``head``, in the compute dtype.
        batch: ``tokens`` and ``labels`` ``[m, B, L]``; ``weight`` ``[m, B, L]`` float32, the mask over the global
            count of valid tokens.
        native_broadcast: whether the backend has a broadcast.
    """

    layout: Layout
    params: Any
    batch: dict[str, jax.Array]
    native_broadcast: bool

    # --- what the schedule implies -----------------------------------------------------------------------------------

    @property
    def trains(self) -> bool:
        """Whether there is a backward."""
        return self.layout.schedule.trains

    @property
    def names(self) -> set[str]:
        """The steps that occur."""
        return {step.name for step in self.layout.schedule.vocabulary.steps}

    @property
    def early(self) -> bool:
        """Whether the input gradient is computed before the barrier, in S, because its sum starts before T."""
        place = {
            (s.op, s.name): (max(t for t in s.at if t is not None), s.after, n)
            for n, s in enumerate(self.layout.schedule.vocabulary.steps)
        }
        return self.trains and "T" in self.names and place["run", "T"] > place["start", "big"]

    # --- tables ------------------------------------------------------------------------------------------------------

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

    def _first_row(self, table: jax.Array) -> jax.Array | int:
        return lax.axis_index(PIPE) * table.shape[0] if self.layout.sharded else 0

    def initial_state(self, rings: dict[str, int]) -> State:
        """The output layer's records, zero gradients of the tables and the final function, zero loss."""
        state: State = {"loss": jnp.zeros((), F32)}
        if self.trains:
            grads = jax.tree.map(
                lambda w: jnp.zeros(w.shape, F32), {k: v for k, v in self.params.items() if k != "blocks"}
            )
            state |= {f"grads.embed.{k}": g for k, g in grads.pop("embed").items()}
            state |= {f"grads.{k}": g for k, g in grads.items()}
        if not self.layout.sharded:
            return state
        _, B, L = self.batch["tokens"].shape
        wide, dtype = (B * L, self.layout.model.width), self.head.dtype
        vector = jnp.zeros((rings["P"], B * L), F32)
        state |= {"X": jnp.zeros((rings["X"], *wide), dtype), "P": {"local": Stats(vector, vector, vector)}}
        if self.trains:
            # The three-barrier reference keeps the logits themselves until it knows their maximum.
            kind = F32 if "S1" in self.names else dtype
            state["P"] |= {"factor": vector, "softmax": jnp.zeros((rings["P"], B * L, self.head.shape[0]), kind)}
            state["A"] = jnp.zeros(wide, dtype)
        return state | {flight(name): value for name, value in self._flights(wide, dtype).items()}

    def _flights(self, wide: tuple[int, int], dtype: jnp.dtype) -> dict[str, Any]:
        """What every collective leaves, before the first has run."""
        vector, matrix = jnp.zeros(wide[:1], F32), jnp.zeros(wide, dtype)
        gathered = jnp.zeros((self.layout.schedule.p, 3, *wide[:1]), F32)
        made = {"CI": matrix, "C0": matrix, "CB": matrix, "big": matrix, "max": vector, "stats": gathered}
        return {name: made[name] for name in made if name in self.names}

    # --- instructions ------------------------------------------------------------------------------------------------

    def execute(self, instruction: Instruction, cells: Cells, state: State) -> State:
        """One instruction of the vocabulary layers."""
        i = cells["microbatch"]
        with jax.named_scope(instruction.name):
            match instruction.op, instruction.name:
                case "run", "IF":
                    return self.embed(state, cells)
                case "run", "IB":
                    return self.embed_backward(state, cells)
                case "start", name:
                    operand, communicate = getattr(self, f"start_{name}")(state, cells)
                    return before_later_passes(state, operand) | {flight(name): communicate(operand)}
                case "done", name:
                    landed = behind_earlier_passes(state, state[flight(name)])
                    return state | getattr(self, f"done_{name}")(state, cells, landed)
                case "run", "S":
                    names = ("P", "A") if self.early else ("P",)
                    return when(i >= 0, state, names, lambda s: self.softmax(s, cells))
                case "run", "S1":
                    return when(i >= 0, state, ("P",), lambda s: self.keep_logits(s, cells))
                case "run", "S2":
                    return when(i >= 0, state, ("P",), lambda s: self.exponentials(s, cells))
                case "run", "T":
                    names = (self.head_gradient,) if self.early else (self.head_gradient, "A")
                    return when(i >= 0, state, names, lambda s: self.gradients(s, cells))
                case "run", "G":
                    return when(i >= 0, state, ("inbox", "grads.final"), lambda s: self.final_backward(s, cells))
                case "run", "H":
                    names = ("inbox", "grads.final", self.head_gradient) if self.trains else ()
                    return when(i >= 0, state, ("loss", *names), lambda s: self.whole_head(s, cells))
        raise ValueError(
            f"the schedule has a step {instruction.op} {instruction.name!r} that the executor does not know"
        )

    # --- input layer -------------------------------------------------------------------------------------------------

    def embed(self, state: State, cells: Cells) -> State:
        """IF: this shard's part of the embedded tokens and positions, or all of it where it is not sharded."""
        ids = get(self.batch["tokens"], jnp.maximum(cells["microbatch"], 0))
        table = self.params["embed"]["tokens"]

        def embedded() -> jax.Array:
            x = vocab.lookup(table, ids, self._first_row(table)) * jnp.asarray(
                self.layout.model.embed_scale, table.dtype
            )
            if (positions := self.params["embed"].get("positions")) is not None:
                x += vocab.lookup(positions, jnp.arange(ids.shape[1]), self._first_row(positions))
            return x

        if self.layout.sharded:
            return state | {"part": embedded()}
        # The unsharded tables are whole on one device only; elsewhere a lookup would be of zeros.
        return when(
            cells["microbatch"] >= 0,
            state,
            ("inbox",),
            lambda s: s | {"inbox": put(s["inbox"], cells["deliver"], embedded())},
        )

    def start_CI(self, state: State, cells: Cells) -> Start:
        return state["part"].reshape(-1, self.layout.model.width), partial(lax.psum, axis_name=PIPE)

    def done_CI(self, state: State, cells: Cells, x: jax.Array) -> State:
        inbox = state["inbox"]
        return {"inbox": put_if(inbox, cells["deliver"], x.reshape(inbox.shape[1:]))}

    def start_CB(self, state: State, cells: Cells) -> Start:
        return self._stream(state, cells), partial(self._broadcast, source=self.layout.schedule.placement[0])

    def done_CB(self, state: State, cells: Cells, g: jax.Array) -> State:
        return {flight("CB"): g}

    def embed_backward(self, state: State, cells: Cells) -> State:
        """IB: scatter-adds the first stage's input gradient into this shard's rows."""
        i = cells["microbatch"]

        def scattered(s: State, g: jax.Array) -> State:
            ids = get(self.batch["tokens"], jnp.maximum(i, 0))
            g = jnp.where(i >= 0, g.reshape(*ids.shape, -1), 0)
            grads = {}
            for name, table in self.params["embed"].items():
                at, scale = (
                    (ids, self.layout.model.embed_scale) if name == "tokens" else (jnp.arange(ids.shape[1]), 1.0)
                )
                addend = g.astype(F32) * scale if name == "tokens" else g.astype(F32).sum(0)
                key = f"grads.embed.{name}"
                grads[key] = vocab.scatter(s[key], at, self._first_row(table), addend)
            return s | grads

        if self.layout.sharded:
            return scattered(state, state[flight("CB")])
        names = tuple(f"grads.embed.{name}" for name in self.params["embed"])
        return when(i >= 0, state, names, lambda s: scattered(s, get(s["inbox"], cells["inbox"])))

    # --- output layer ------------------------------------------------------------------------------------------------

    def start_C0(self, state: State, cells: Cells) -> Start:
        return self._stream(state, cells), partial(self._broadcast, source=self.layout.schedule.placement[-1])

    def done_C0(self, state: State, cells: Cells, x: jax.Array) -> State:
        return {"X": put_if(state["X"], cells["X"], x)}

    def softmax(self, state: State, cells: Cells) -> State:
        """S: local logits and softmax; in Algorithm 2 also ``A = P' W``."""
        y = vocab.logits(self.head, self._hidden(state, cells), self.shard)
        p, stats = vocab.local_softmax(y, self._labels(cells), self.shard, self.head.dtype)
        record = get(state["P"], cells["P"]) | {"local": stats}
        if self.trains:
            record |= {"softmax": p}
        state = state | {"P": put(state["P"], cells["P"], record)}
        return state | {"A": vocab.unscaled_input_gradient(p, self.head)} if self.early else state

    def keep_logits(self, state: State, cells: Cells) -> State:
        """S1 of the three-barrier reference: logits and their local maximum."""
        y = vocab.logits(self.head, self._hidden(state, cells), self.shard)
        target = vocab.target_logits(y, self._labels(cells), self.shard)
        local = Stats(jnp.max(y, axis=1), jnp.zeros_like(target), target)
        record = get(state["P"], cells["P"]) | {"softmax": y, "local": local}
        return state | {"P": put(state["P"], cells["P"], record)}

    def exponentials(self, state: State, cells: Cells) -> State:
        """S2 of the three-barrier reference: exponentials below the global maximum, and their local sum."""
        record = get(state["P"], cells["P"])
        local = record["local"]
        e = jnp.exp(record["softmax"] - local.maximum[:, None])
        record |= {"softmax": e, "local": local._replace(sum=e.sum(1))}
        return state | {"P": put(state["P"], cells["P"], record)}

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

    def gradients(self, state: State, cells: Cells) -> State:
        """T: the weight gradient; behind the barrier (Algorithm 1) also this shard's part of the input gradient."""
        record = get(state["P"], cells["P"])
        dy = vocab.logit_gradient(
            record["softmax"], record["factor"], self._weight(cells), self._labels(cells), self.shard
        )
        dy = dy.astype(self.head.dtype)
        total = vocab.weight_gradient(state[self.head_gradient], dy, self._hidden(state, cells))
        state = state | {self.head_gradient: total}
        return state if self.early else state | {"A": vocab.input_gradient(dy, self.head)}

    def start_big(self, state: State, cells: Cells) -> Start:
        part = state["A"]
        if self.early:
            scale = get(state["P"]["factor"], jnp.maximum(cells["P"], 0))
            part = vocab.partial_input_gradient(
                part, self.head, scale, self._weight(cells), self._labels(cells), self.shard
            )
        return part, partial(lax.psum, axis_name=PIPE)

    def done_big(self, state: State, cells: Cells, g: jax.Array) -> State:
        return {flight("big"): g}

    def final_backward(self, state: State, cells: Cells) -> State:
        """G: the final function's backward, into the last stage's inbox."""
        return self._final_vjp(state, cells, get(state["X"], cells["X"]), state[flight("big")])

    def whole_head(self, state: State, cells: Cells) -> State:
        """H: the whole output layer on one device, forward and backward."""
        x = get(state["inbox"], cells["inbox"]).reshape(-1, self.layout.model.width)
        hidden, labels, weight = (
            self.layout.model.final(self.params["final"], x),
            self._labels(cells),
            self._weight(cells),
        )
        y = vocab.logits(self.head, hidden, self.shard)
        p, stats = vocab.local_softmax(y, labels, self.shard, self.head.dtype)
        state = state | {"loss": state["loss"] + jnp.sum(weight * vocab.losses(stats))}
        if not self.trains:
            return state
        dy = vocab.logit_gradient(p, jnp.ones_like(weight), weight, labels, self.shard)
        state = state | {self.head_gradient: vocab.weight_gradient(state[self.head_gradient], dy, hidden)}
        return self._final_vjp(state, cells, x, vocab.input_gradient(dy, self.head))

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

    def _stream(self, state: State, cells: Cells) -> jax.Array:
        """What waits in the inbox ``[N, D]``: meaningful on the device that a broadcast comes from."""
        return get(state["inbox"], jnp.maximum(cells["inbox"], 0)).reshape(-1, self.layout.model.width)

    def _broadcast(self, x: jax.Array, source: int) -> jax.Array:
        """One device's array on all: natively, or by a masked sum where the backend has no broadcast."""
        if self.native_broadcast:
            return lax.pbroadcast(x, (PIPE,), source)
        return lax.psum(jnp.where(lax.axis_index(PIPE) == source, x, jnp.zeros_like(x)), PIPE)
