"""Executes the vocabulary instructions of one device.

Instruction names are those of :mod:`vocabpp_jax.schedules.instructions`; the arithmetic is in :mod:`vocabpp_jax.vocab`.
"""

from __future__ import annotations

from functools import cached_property

import jax
import jax.numpy as jnp

from ...pipeline.buffers import Cells, State, passes_wait_for, wait_for_passes, zeros
from ...schedules import Instruction
from .input_steps import InputSteps
from .output_steps import OutputSteps
from .vocabulary_layer import Collective, Run, flight, send_buffer

F32 = jnp.float32


class VocabularySteps(InputSteps, OutputSteps):
    """The vocabulary layers of one device, for one batch."""

    def initial_state(self, rings: dict[str, int]) -> State:
        """Empty records of the output layer; zero gradients of the tables and the final function; zero loss."""
        state: State = {"loss": jnp.zeros(1 + self.depths, F32)}
        if self.trains:
            grads = jax.tree.map(
                lambda w: jnp.zeros(w.shape, F32), {k: v for k, v in self.params.items() if k != "blocks"}
            )
            for part in ("embed", "ahead"):
                state |= {f"grads.{part}.{k}": g for k, g in grads.pop(part, {}).items()}
            state |= {f"grads.{k}": g for k, g in grads.items()}
        if not self.layout.sharded:
            return state
        tokens = self.streams.shape[0]
        state |= {"X": zeros(rings["X"], self.streams), "P": self.empty_records(rings["P"], tokens)}
        if self.trains:
            state["A"] = jnp.zeros(self.summed.shape, self.summed.dtype)
            state |= self.initial_uniform(tokens) | self.initial_span()
        for name in sorted(self.names):  # in one order in every process: all must compile the same program
            if isinstance(collective := self.registry[name], Collective):
                state[flight(name)] = jnp.zeros(collective.result.shape, collective.result.dtype)
                if collective.sends:
                    state[send_buffer(name)] = jnp.zeros(collective.result.shape, collective.result.dtype)
        return state

    @cached_property
    def registry(self) -> dict[str, Run | Collective]:
        """The implementation of every vocabulary row of the instruction table, by name."""
        return self.input_steps() | self.output_steps()

    def execute(self, instruction: Instruction, cells: Cells, state: State) -> State:
        """Runs one instruction of the vocabulary layers.

        Raises:
            ValueError: the schedule contains a step that the executor does not implement.
        """
        op, name = instruction.op, instruction.name
        step = self.registry.get(name)
        if step is None or isinstance(step, Collective) != (op in ("start", "done")):
            raise ValueError(f"the schedule has a step {op} {name!r}, which the executor does not implement")
        with jax.named_scope(name):
            match op:
                case "start":
                    return self._start(name, step, cells, state)
                case "done":
                    landed = wait_for_passes(state, state[flight(name)])
                    return passes_wait_for(state, landed) | step.done(state, cells, landed)
            return step(state, cells)

    def _start(self, name: str, collective: Collective, cells: Cells, state: State) -> State:
        # ``make`` computes the operand in a loop. Otherwise XLA would fuse an elementwise operand, or one read from a
        # ring cell, with later passes, and copy the ring for that.
        if collective.make:
            state = collective.make(state, cells)
        operand, communicate = collective.start(state, cells)
        if not collective.lands_first:
            state = passes_wait_for(state, operand)
        result = communicate(operand)
        # The sum's operand is dead from here on; replacing it in the state lets its buffer hold the sum. A broadcast's
        # send buffer stays: the result may still be in flight in the next interval, which sends the next one.
        spent = {"A": result} if state.get("A") is operand else {}
        return state | spent | {flight(name): result}
