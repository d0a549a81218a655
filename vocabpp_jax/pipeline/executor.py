"""The executor: traces a lowered schedule into a single SPMD program.

Runs inside ``shard_map``. Each segment of the program is a ``lax.scan`` over intervals whose body runs the segment's
instructions in order. A pass runs inside a ``lax.while_loop`` of zero or one trips: unlike a conditional, a loop
updates its carry in place, so gradient accumulators and ring buffers are not copied in the slots of other passes.
Collectives are outside the loops, at the same place on every device.

The executor is independent of schedules and models: blocks are pure functions, and the vocabulary layers' steps are in
:mod:`vocabpp_jax.vocab.instructions`.

Shapes, per device: m microbatches, B microbatch, L length, D width; rings have a leading axis of cells.
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
from .transfers import fill_outbox, land_transfer, start_transfer


@dataclass(frozen=True)
class Executor:
    """One device's program for one batch.

    Attributes:
        program, layout: the program to run, and the placement of the parameters.
        block: the passes of one layer.
        steps: the vocabulary layers' instructions.
        params: this device's part of the parameters, as returned by :meth:`.Pipeline.rounded`; ``blocks[chunk][j]``
            without the device axis.
        aux_inputs: per-microbatch inputs of the blocks, ``[m, B, ...]``.
        x: shape and dtype of the stream between blocks, ``[B, L, D]``.
        tail: predicts further tokens, if the model has a tail.
        auxiliary: whether a block returns a scalar for the loss besides the stream.
        observe: whether to count the activations in flight.
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
        """Runs the whole program and returns the final state, which includes ``loss`` and ``grads.*``."""
        state = self.initial_state()
        for segment in self.program.segments:
            state = self.run_segment(segment, state)
        return state

    def initial_state(self) -> State:
        """Allocates all buffers: rings of the sizes that the schedule needs, zero gradients, zero loss."""
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
        """One scan over a segment's intervals.

        Collectives still in flight at the end of an interval are carried to the next; transfers land within theirs.
        """
        columns, table = _stacked_tables(segment)
        rows = lax.dynamic_index_in_dim(jnp.asarray(table), lax.axis_index(PIPE), axis=1, keepdims=False)
        local = _landed_within(self.program)
        carried = tuple(n for n in state if n not in local)

        def interval(carry: State, row: jax.Array) -> tuple[State, None]:
            transfers: dict[int, jax.Array] = {}
            for instruction, column_of in zip(segment.body, columns, strict=True):
                cells = {name: row[c] for name, c in column_of.items()}
                match instruction.op:
                    case "permute":
                        carry, transfers[instruction.transfer] = start_transfer(carry, instruction, cells)
                    case "land":
                        carry = land_transfer(carry, transfers.pop(instruction.transfer), cells)
                    case _:
                        carry = self.execute(instruction, cells, carry)
            return {n: carry[n] for n in carried}, None

        return lax.scan(interval, {n: state[n] for n in carried}, rows)[0]

    def execute(self, instruction: Instruction, cells: Cells, state: State) -> State:
        """Runs one instruction other than a transfer between devices."""
        if instruction.op == "keep":
            return state | {"inbox": put_if(state["inbox"], cells["deliver"], state["out"])}
        if instruction.name in self.passes:
            return self._pass(instruction, cells, state)
        return self.steps.execute(instruction, cells, state)

    @cached_property
    def passes(self) -> dict[str, Callable[[State, Cells, int], State]]:
        """The implementation of every per-stage row of the instruction table."""
        return {"F": self.forward, "B": self.backward, "W": self.weights}

    def _pass(self, instruction: Instruction, cells: Cells, state: State) -> State:
        """Runs a stage's pass if it is this device's turn; the named scope appears in profiles and compiled code."""
        c, kind = instruction.chunk, KINDS[instruction.name]
        updates = kind.rings(self.program.schedule) + self._counter_names()
        if kind.sends:
            updates += ("out", *(("outbox",) if "outbox" in state else ()))
        if kind.name != "F":
            updates += (f"grads.blocks.{c}",)
        updates += self._tail_updates(kind.name, cells) + self._scalar_names(state)
        with jax.named_scope(f"{kind.name}{c}"):
            run = self.passes[kind.name]
            return run_if(cells["microbatch"] >= 0, state, updates, lambda s: run(s, cells, c))

    # --- passes ------------------------------------------------------------------------------------------------------

    def forward(self, state: State, cells: Cells, c: int) -> State:
        """F: a stage's layers in order, each storing its residuals in the rings."""
        state = state | {"out": get(state["inbox"], cells["inbox"])}

        def layer(s: State, j: int) -> State:
            aux_inputs = self.aux_inputs_of(cells, c, j)
            y_BLD, residual, kept = self.block.forward(self.params["blocks"][c][j], aux_inputs, s["out"])
            if "auxiliary" in s:
                y_BLD, scalar = y_BLD
                s = s | {"auxiliary": s["auxiliary"] + scalar}
            s = s | {"out": y_BLD}
            for ring, values in (("residual", residual), ("kept", kept)):
                if ring in s:
                    s = s | {ring: replaced(s[ring], j, put(s[ring][j], cells[ring], values))}
            return s

        names = ("out", *KINDS["F"].rings(self.program.schedule), *self._scalar_names(state))
        state = self._run_tail(self._each_layer(state, c, range(self.layout.depth), layer, names), cells, "F")
        return self._mark(fill_outbox(state, cells), cells, True)

    def backward(self, state: State, cells: Cells, c: int) -> State:
        """B: a stage's layers in reverse order, from the gradient in the inbox."""
        state = self._run_tail(state | {"out": get(state["inbox"], cells["inbox"])}, cells, "B")
        grads = f"grads.blocks.{c}"

        def layer(s: State, j: int) -> State:
            aux_inputs = self.aux_inputs_of(cells, c, j)
            # Only one layer's residuals are live at a time: they are read once the layer above has its gradients.
            above = (s["out"], s[grads][j + 1] if j + 1 < self.layout.depth else ())
            residual = get(s["residual"][j], delay_until(cells["residual"], above))
            kept = get(s["kept"][j], delay_until(cells["kept"], above)) if "kept" in s else ()
            dparams, dx_BLD, carried = self.block.backward(
                self.params["blocks"][c][j], aux_inputs, residual, kept, s["out"]
            )
            s = s | {"out": dx_BLD, grads: replaced(s[grads], j, accumulated(s[grads][j], dparams))}
            if "carried" in s:
                s = s | {"carried": replaced(s["carried"], j, put(s["carried"][j], cells["carried"], carried))}
            return s

        names = ("out", grads, *KINDS["B"].rings(self.program.schedule))
        state = fill_outbox(self._each_layer(state, c, range(self.layout.depth)[::-1], layer, names), cells)
        return state if self.program.schedule.splits_backward else self._mark(state, cells, False)

    def weights(self, state: State, cells: Cells, c: int) -> State:
        """W: the weight gradients of a stage's layers, from the values kept by F and carried over by B."""
        grads = f"grads.blocks.{c}"

        def layer(s: State, j: int) -> State:
            # Only one layer's values are live at a time. The first layer's reads wait for the clock alone: if they
            # waited for its own gradients, XLA might fuse them with the accumulation and copy the gradients.
            def cell(ring: str) -> jax.Array:
                return delay_until(cells[ring], s[grads][j - 1]) if j else wait_for_passes(s, cells[ring])

            dparams = self.block.weights(
                self.params["blocks"][c][j],
                self.aux_inputs_of(cells, c, j),
                get(s["kept"][j], cell("kept")),
                get(s["carried"][j], cell("carried")),
            )
            return s | {grads: replaced(s[grads], j, accumulated(s[grads][j], dparams))}

        state = self._run_tail(self._each_layer(state, c, range(self.layout.depth), layer, (grads,)), cells, "W")
        return self._mark(state, cells, False)

    def aux_inputs_of(self, cells: Cells, c: int, j: int) -> Any:
        """The aux inputs of a chunk's j-th layer for one microbatch: those of the batch and of the layer."""
        return get(self.aux_inputs, cells["microbatch"]) | get(self.layout.layer_aux_inputs[c][j], lax.axis_index(PIPE))

    def _each_layer(
        self, state: State, c: int, order: range, layer: Callable[[State, int], State], names: tuple[str, ...]
    ) -> State:
        """Applies a function to every layer of this device; if stages are uneven, shorter ones skip the last layers."""
        counts = np.array([self.layout.layer_counts[stage] for stage in self.layout.stage_of[c]])
        count = jnp.asarray(counts)[lax.axis_index(PIPE)]
        for j in order:
            if j < counts.min():
                state = layer(state, j)
            else:
                state = run_if(j < count, state, names, lambda s, j=j: layer(s, j))
        return state

    def _run_tail(self, state: State, cells: Cells, kind: str) -> State:
        """Runs the tail's part of a pass, if the pass has a cell for it; only the last stage's does."""
        if CELL[kind] not in cells:
            return state
        updates = KINDS[kind].rings(self.program.schedule) + self._tail_updates(kind, cells)
        run = {"F": self.tail.forward, "B": self.tail.backward, "W": self.tail.weights}[kind]
        return run_if(cells[CELL[kind]] >= 0, state, updates, lambda s: run(s, cells))

    def _tail_updates(self, kind: str, cells: Cells) -> tuple[str, ...]:
        """The entries that the tail's part of a pass updates besides the pass's rings; none if it has no such part."""
        return self.tail.changes[kind] if CELL[kind] in cells else ()

    # --- observation -------------------------------------------------------------------------------------------------

    def _scalar_names(self, state: State) -> tuple[str, ...]:
        return ("auxiliary",) if "auxiliary" in state else ()

    def _counter_names(self) -> tuple[str, ...]:
        return ("alive", "in_flight", "clobbered") if self.observe else ()

    def _mark(self, state: State, cells: Cells, alive: bool) -> State:
        """Marks an activation's cell as alive or free; records the peak, and whether it was so already (clobbered)."""
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


def _stacked_tables(segment: Segment) -> tuple[list[dict[str, int]], np.ndarray]:
    """Each instruction's columns by table name, and all tables of a segment stacked: ``[intervals, p, columns]``."""
    columns, stacked = [], []
    for instruction in segment.body:
        columns.append({name: len(stacked) + n for n, name in enumerate(instruction.tables)})
        stacked += instruction.tables.values()
    return columns, np.stack(stacked, axis=-1)


def _landed_within(program: Program) -> set[str]:
    """State entries of collectives that are never in flight between intervals, and so need not be carried."""
    names = {i.name for s in program.segments for i in s.body if i.op == "start"}
    crossing = set()
    for segment in program.segments:
        ends: dict[str, list[str]] = {}
        for i in segment.body:
            if i.op in ("start", "done"):
                ends.setdefault(i.name, []).append(i.op)
        crossing |= {name for name, ops in ends.items() if ops[0] == "done" or ops[-1] == "start"}
    return {flight(name) for name in names - crossing}
