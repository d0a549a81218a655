"""What each instruction of the vocabulary layers does to a device's state.

The names are those of :mod:`vocabpp_jax.schedules.vocabulary`; the arithmetic is in :mod:`vocabpp_jax.vocab`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ... import vocab
from ...pipeline.buffers import Cells, State, before_later_passes, behind_earlier_passes
from ...schedules import Instruction
from .input_steps import InputSteps
from .output_steps import OutputSteps
from .vocabulary_layer import flight, sent

F32 = jnp.float32

# Sums that land before any pass replaces their operand. The landing holds those passes back; to read the operand for
# that, as of other collectives, would keep it alive beside the sum that the backend makes in its place. In a schedule
# where such a pass does come first (gpipe), the compiler copies the operand.
LANDS_FIRST = ("big",)


class VocabularySteps(InputSteps, OutputSteps):
    """The vocabulary layers of one device, for one batch."""

    def initial_state(self, rings: dict[str, int]) -> State:
        """The output layer's records, zero gradients of the tables and the final function, zero loss."""
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
        _, B, L = self.batch["tokens"].shape
        width, dtype, tokens = self.layout.model.width, self.dtype, (1 + self.depths) * B * L
        state |= {"X": jnp.zeros((rings["X"], tokens, width), dtype), "P": self.empty_records(rings["P"], tokens)}
        if self.trains:
            state["A"] = jnp.zeros((tokens, width), vocab.summed_dtype(dtype))
            state |= self.initial_uniform(tokens) | self.initial_span()
        narrow, wide = jnp.zeros((B * L, width), dtype), jnp.zeros((tokens, width), dtype)
        state |= {sent(name): x for name, x in (("C0", wide), ("CB", narrow)) if name in self.names}
        vector, gathered = jnp.zeros(tokens, F32), jnp.zeros((self.layout.shards, 3, tokens), F32)
        summed = wide.astype(vocab.summed_dtype(dtype))
        # What every collective leaves, before the first has run.
        made = {"CI": narrow, "C0": wide, "CB": narrow, "big": summed, "max": vector, "stats": gathered}
        return state | {flight(name): x for name, x in made.items() if name in self.names}

    def execute(self, instruction: Instruction, cells: Cells, state: State) -> State:
        """One instruction of the vocabulary layers."""
        op, name = instruction.op, instruction.name
        step = getattr(self, f"{op}_{name}", None)
        if step is None:
            raise ValueError(f"the schedule has a step {op} {name!r} that the executor does not know")
        with jax.named_scope(name):
            match op:
                case "start":
                    # What is merely elementwise or a cell of a ring, XLA would make with what passes make later, and
                    # copy the ring for it, unless a loop makes it.
                    if make := getattr(self, f"make_{name}", None):
                        state = make(state, cells)
                    operand, communicate = step(state, cells)
                    if name not in LANDS_FIRST:
                        state = before_later_passes(state, operand)
                    result = communicate(operand)
                    # The sum's operand is spent: forgotten, it can hold the sum. What a broadcast sends stays, for its
                    # result may be under way into the next interval, in which the next one is sent.
                    spent = {"A": result} if state.get("A") is operand else {}
                    return state | spent | {flight(name): result}
                case "done":
                    landed = behind_earlier_passes(state, state[flight(name)])
                    return before_later_passes(state, landed) | step(state, cells, landed)
            return step(state, cells)
