"""The executor: a lowered schedule in, one program for every device out.

Runs inside ``shard_map``. Every segment of the program is a ``lax.scan`` over intervals, its body the segment's
instructions in order. A pass runs inside a ``lax.while_loop`` of zero or one trips: unlike a conditional, a loop
carries what it updates in place, so that gradient accumulators and ring buffers are not copied in the slots of other
passes. Collectives are outside the loops, at the same place on every device.

Nothing here knows a schedule by name, nor a model: blocks are pure functions, and what the output layer's steps do is
in :mod:`vocabpp_jax.vocab.instructions`.

Shapes, per device: B microbatch, L length, D width; rings have their cells in front.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..schedules import KINDS, Instruction, Program, Segment
from ..vocab.instructions import VocabularySteps, flight
from .buffers import (
    Cells,
    State,
    accumulated,
    delay_until,
    get,
    passes_wait_for,
    put,
    put_if,
    replaced,
    run_if,
    wait_for_passes,
    zeros,
)
from .layout import Layout
from .linearize import Linearized
from .mesh import PIPE
from .tail_passes import CELL, Tail


@dataclass(frozen=True)
class Executor:
    """One device's program for one batch.

    Attributes:
        program, layout: what to run, and where the parameters are.
        block: the passes of one layer.
        steps: what the vocabulary layers' instructions do.
        params: this device's part as :meth:`.Pipeline.rounded` leaves it; ``blocks[chunk][j]`` without the device
            axis.
        aux_inputs: per-microbatch inputs of the blocks, ``[m, B, ...]``.
        x: shape and dtype of the stream between blocks.
        tail: what predicts further tokens, where the model has it.
        auxiliary: whether a block returns a scalar for the loss beside the stream.
        observe: count the activations in flight while running.
    """

    program: Program
    layout: Layout
    block: Linearized
    steps: VocabularySteps
    params: Any
    aux_inputs: Any
    x: jax.ShapeDtypeStruct
    tail: Tail | None = None
    auxiliary: bool = False
    observe: bool = False

    def __call__(self) -> State:
        """Runs the whole program; returns the final state, with ``loss`` and ``grads.*`` among it."""
        state = self.initial_state()
        for segment in self.program.segments:
            state = self.run_segment(segment, state)
        return state

    def initial_state(self) -> State:
        """All buffers: rings of the schedule's own size, zero gradients, zero loss."""
        rings = self.program.rings
        state = {
            "inbox": zeros(rings["inbox"], self.x),
            "out": jnp.zeros(self.x.shape, self.x.dtype),
            "clock": jnp.zeros((), jnp.int32),
        }
        if "outbox" in rings:
            state["outbox"] = zeros(rings["outbox"], self.x)
        for ring in ("residual", "kept", "carried"):
            if ring in rings:
                state[ring] = (zeros(rings[ring], getattr(self.block, ring)),) * self.layout.depth
        if self.program.schedule.trains:
            for c, layers in enumerate(self.params["blocks"]):
                state[f"grads.blocks.{c}"] = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), layers)
        if self.observe:
            cells = rings.get("kept", rings.get("residual", 1))
            state |= {
                "alive": jnp.zeros(cells, bool),
                "in_flight": jnp.zeros((), jnp.int32),
                "clobbered": jnp.zeros((), bool),
            }
        if self.auxiliary:
            state["auxiliary"] = jnp.zeros((), jnp.float32)
        if self.tail:
            state |= self.tail.initial_state(rings, self.x)
        return state | self.steps.initial_state(rings)

    def run_segment(self, segment: Segment, state: State) -> State:
        """One scan. Collectives under way when a step ends are carried to the next; transfers land before it ends."""
        columns, table = _columns(segment)
        mine = lax.dynamic_index_in_dim(jnp.asarray(table), lax.axis_index(PIPE), axis=1, keepdims=False)
        local = _landed_within(self.program)
        kept = tuple(n for n in state if n not in local)

        def interval(carry: State, row: jax.Array) -> tuple[State, None]:
            under_way: dict[int, jax.Array] = {}
            for instruction, places in zip(segment.body, columns, strict=True):
                cells = {name: row[c] for name, c in places.items()}
                match instruction.op:
                    case "permute":
                        carry, under_way[instruction.transfer] = _sent(carry, instruction, cells)
                    case "land":
                        carry = _landed(carry, under_way.pop(instruction.transfer), cells)
                    case _:
                        carry = self.execute(instruction, cells, carry)
            return {n: carry[n] for n in kept}, None

        return lax.scan(interval, {n: state[n] for n in kept}, mine)[0]

    def execute(self, instruction: Instruction, cells: Cells, state: State) -> State:
        """One instruction that is not a transfer between devices."""
        if instruction.op == "keep":
            return state | {"inbox": put_if(state["inbox"], cells["deliver"], state["out"])}
        if instruction.name in self.passes:
            return self._pass(instruction, cells, state)
        return self.steps.execute(instruction, cells, state)

    @cached_property
    def passes(self) -> dict[str, Callable[[State, Cells, int], State]]:
        """What runs each row of the table of instructions that is a stage's."""
        return {"F": self.forward, "B": self.backward, "W": self.weights}

    def _pass(self, instruction: Instruction, cells: Cells, state: State) -> State:
        """A stage's pass where it is this device's turn, named as profiles and compiled code will show it."""
        c, kind = instruction.chunk, KINDS[instruction.name]
        updates = kind.rings(self.program.schedule) + self._counters()
        if kind.sends:
            updates += ("out", *(("outbox",) if "outbox" in state else ()))
        if kind.name != "F":
            updates += (f"grads.blocks.{c}",)
        updates += self._of_tail(kind.name, cells) + self._sums(state)
        with jax.named_scope(f"{kind.name}{c}"):
            run = self.passes[kind.name]
            return run_if(cells["microbatch"] >= 0, state, updates, lambda s: run(s, cells, c))

    # --- passes ------------------------------------------------------------------------------------------------------

    def forward(self, state: State, cells: Cells, c: int) -> State:
        """F: a stage's layers in order, each leaving its residuals in the rings."""
        state = state | {"out": get(state["inbox"], cells["inbox"])}

        def layer(s: State, j: int) -> State:
            aux_inputs = self.aux_inputs_of(cells, c, j)
            y, residual, kept = self.block.forward(self.params["blocks"][c][j], aux_inputs, s["out"])
            if "auxiliary" in s:
                y, scalar = y
                s = s | {"auxiliary": s["auxiliary"] + scalar}
            s = s | {"out": y}
            for ring, values in (("residual", residual), ("kept", kept)):
                if ring in s:
                    s = s | {ring: replaced(s[ring], j, put(s[ring][j], cells[ring], values))}
            return s

        names = ("out", *KINDS["F"].rings(self.program.schedule), *self._sums(state))
        state = self._with_tail(self._each_layer(state, c, range(self.layout.depth), layer, names), cells, "F")
        return self._occupy(_left(state, cells), cells, True)

    def backward(self, state: State, cells: Cells, c: int) -> State:
        """B: a stage's layers in reverse, from the gradient that arrived."""
        state = self._with_tail(state | {"out": get(state["inbox"], cells["inbox"])}, cells, "B")
        grads = f"grads.blocks.{c}"

        def layer(s: State, j: int) -> State:
            aux_inputs = self.aux_inputs_of(cells, c, j)
            # One layer's residuals at a time: the next is read when this one's gradients are made.
            made = (s["out"], s[grads][j + 1] if j + 1 < self.layout.depth else ())
            residual = get(s["residual"][j], delay_until(cells["residual"], made))
            kept = get(s["kept"][j], delay_until(cells["kept"], made)) if "kept" in s else ()
            dparams, dx, carried = self.block.backward(
                self.params["blocks"][c][j], aux_inputs, residual, kept, s["out"]
            )
            s = s | {"out": dx, grads: replaced(s[grads], j, accumulated(s[grads][j], dparams))}
            if "carried" in s:
                s = s | {"carried": replaced(s["carried"], j, put(s["carried"][j], cells["carried"], carried))}
            return s

        names = ("out", grads, *KINDS["B"].rings(self.program.schedule))
        state = _left(self._each_layer(state, c, range(self.layout.depth)[::-1], layer, names), cells)
        return state if self.program.schedule.splits_backward else self._occupy(state, cells, False)

    def weights(self, state: State, cells: Cells, c: int) -> State:
        """W: the weight gradients of a stage's layers, from what F kept and B carried over."""
        grads = f"grads.blocks.{c}"

        def layer(s: State, j: int) -> State:
            # One layer's at a time. The first layer's wait for the clock alone: behind its own gradients, XLA may fuse
            # what is read with the addition to them, and copies them.
            def cell(ring: str) -> jax.Array:
                return delay_until(cells[ring], s[grads][j - 1]) if j else wait_for_passes(s, cells[ring])

            dparams = self.block.weights(
                self.params["blocks"][c][j],
                self.aux_inputs_of(cells, c, j),
                get(s["kept"][j], cell("kept")),
                get(s["carried"][j], cell("carried")),
            )
            return s | {grads: replaced(s[grads], j, accumulated(s[grads][j], dparams))}

        state = self._with_tail(self._each_layer(state, c, range(self.layout.depth), layer, (grads,)), cells, "W")
        return self._occupy(state, cells, False)

    def aux_inputs_of(self, cells: Cells, c: int, j: int) -> Any:
        """One microbatch's inputs of this device's j-th layer of a chunk beside x: the batch's and the layer's own."""
        return get(self.aux_inputs, cells["microbatch"]) | get(self.layout.layer_aux_inputs[c][j], lax.axis_index(PIPE))

    def _each_layer(
        self, state: State, c: int, order: range, layer: Callable[[State, int], State], names: tuple[str, ...]
    ) -> State:
        """Applies a function to every layer that this device has; of uneven stages, the short ones skip the last."""
        counts = np.array([self.layout.layer_counts[stage] for stage in self.layout.stage_of[c]])
        mine = jnp.asarray(counts)[lax.axis_index(PIPE)]
        for j in order:
            if j < counts.min():
                state = layer(state, j)
            else:
                state = run_if(j < mine, state, names, lambda s, j=j: layer(s, j))
        return state

    def _with_tail(self, state: State, cells: Cells, kind: str) -> State:
        """What of a pass is the tail's, where the pass has a cell for it: only the last stage's has."""
        if CELL[kind] not in cells:
            return state
        updates = KINDS[kind].rings(self.program.schedule) + self._of_tail(kind, cells)
        run = {"F": self.tail.forward, "B": self.tail.backward, "W": self.tail.weights}[kind]
        return run_if(cells[CELL[kind]] >= 0, state, updates, lambda s: run(s, cells))

    def _of_tail(self, kind: str, cells: Cells) -> tuple[str, ...]:
        """What the tail's part of a pass changes beside the pass's rings, nothing where it has none."""
        return self.tail.changes[kind] if CELL[kind] in cells else ()

    # --- observation -------------------------------------------------------------------------------------------------

    def _sums(self, state: State) -> tuple[str, ...]:
        return ("auxiliary",) if "auxiliary" in state else ()

    def _counters(self) -> tuple[str, ...]:
        return ("alive", "in_flight", "clobbered") if self.observe else ()

    def _occupy(self, state: State, cells: Cells, alive: bool) -> State:
        """Marks an activation's cell as alive or free, and remembers the most alive and any overwritten while alive."""
        if not self.observe or not self.program.schedule.trains:
            return state
        cell = cells["kept"] if "kept" in cells else cells["residual"]
        clobbered = state["clobbered"] | (state["alive"][cell] == alive)
        flags = state["alive"].at[cell].set(alive)
        return state | {
            "alive": flags,
            "clobbered": clobbered,
            "in_flight": jnp.maximum(state["in_flight"], flags.sum(dtype=jnp.int32)),
        }


def _left(state: State, cells: Cells) -> State:
    """Leaves what a pass made in the outbox, where its transfer is deferred."""
    return state | {"outbox": put_if(state["outbox"], cells["outbox"], state["out"])} if "outbox" in cells else state


def _sent(state: State, instruction: Instruction, cells: Cells) -> tuple[State, jax.Array]:
    """Starts a transfer of what the latest pass made, or of what one of the interval before left in the outbox.

    It leaves from a buffer that later passes do not write.
    """
    with jax.named_scope("transfer"):
        made = get(state["outbox"], jnp.maximum(cells["outbox"], 0)) if "outbox" in cells else state["out"]
        leaving = wait_for_passes(state, made)
        arriving = lax.ppermute(leaving, PIPE, instruction.pairs)
    return passes_wait_for(state, leaving), arriving


def _landed(state: State, arriving: jax.Array, cells: Cells) -> State:
    """Puts what has arrived into the inbox, and no sooner: the passes until then need not wait for it."""
    arrived = wait_for_passes(state, arriving)
    return state | {"inbox": put_if(state["inbox"], cells["deliver"], arrived)}


def _columns(segment: Segment) -> tuple[list[dict[str, int]], np.ndarray]:
    """All tables of a segment as one array ``[intervals, p, columns]``, and each instruction's columns."""
    places, stacked = [], []
    for instruction in segment.body:
        places.append({name: len(stacked) + n for n, name in enumerate(instruction.tables)})
        stacked += instruction.tables.values()
    return places, np.stack(stacked, axis=-1)


def _landed_within(program: Program) -> set[str]:
    """Collectives that never are under way between two intervals, and so need no place in the carried state."""
    names = {i.name for s in program.segments for i in s.body if i.op == "start"}
    crossing = set()
    for segment in program.segments:
        ends: dict[str, list[str]] = {}
        for i in segment.body:
            if i.op in ("start", "done"):
                ends.setdefault(i.name, []).append(i.op)
        crossing |= {name for name, ops in ends.items() if ops[0] == "done" or ops[-1] == "start"}
    return {flight(name) for name in names - crossing}
