"""A program that repeats single passes of one device, each as often as requested at run time.

One device of p is a pipeline of one stage with that device's layers and its rows of the tables, fed with tokens of the
whole vocabulary: tokens outside its rows cost what they cost a shard. The passes are the executor's own; collectives
between one device and itself do nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from speed_measure.speed_passes import RINGS
from vocabpp_jax import Pipeline
from vocabpp_jax.pipeline.buffers import State, run_if
from vocabpp_jax.pipeline.executor import Executor
from vocabpp_jax.pipeline.microbatches import checked
from vocabpp_jax.pipeline.precision import exact_products
from vocabpp_jax.schedules import Instruction, Program

from .timing import ids, middle, noise, seconds

CELLS = 2  # minimum cells per ring: with one, the compiler would drop the ring
IDLE = "idle"  # runs between the timed passes
# state that starts at zero; everything else starts with pseudo-random values
EMPTY = ("grads.", "loss", "clock", "swept", "part")
# C1 is what a device computes before the sum of Algorithm 2; the statistics are what it computes around their gather.
COLLECTIVES = {"C1": ("start grad_sum", "done grad_sum"), "stats": ("start stats", "done stats")}
PASSES = ("IF", "F", "S", "S1", "S2", "stats", "T", "C1", "G", "H", "B", "W", "IB")


@dataclass(frozen=True)
class Passes(Pipeline):
    """Passes of one device in loops.

    Attributes:
        names: which passes, in the order of :data:`PASSES`.
        swept: float32 values changed before every pass, so that no pass finds its input in the caches.
    """

    names: tuple[str, ...] = ()
    swept: int = 2**24

    @cached_property
    def program(self) -> Program:
        program = super().program
        return replace(program, peaks={ring: (max(*n, CELLS),) for ring, n in program.peaks.items()})

    @cached_property
    def instructions(self) -> dict[str, tuple[Instruction, ...]]:
        """The instructions for every name."""
        found: dict[str, Instruction] = {}
        for segment in self.program.segments:
            for i in segment.body:
                found.setdefault(f"{i.op} {i.name}", i)
        names = {name: COLLECTIVES.get(name, (f"run {name}",)) for name in PASSES}
        there = {
            name: tuple(found[key] for key in keys) for name, keys in names.items() if all(k in found for k in keys)
        }
        if self.schedule.method != "vocab-2":
            there.pop("C1", None)
        return {name: there[name] for name in self.names if name in there}

    def compile(self, length: int, vocab_size: int, batch: int = 1) -> tuple[Any, Callable[[], tuple[Any, Any]]]:
        """``(params, batch, repeats) -> number``, and a function that creates its parameters and tokens.

        ``repeats`` counts every pass and, last, the idle work between two sweeps. Tokens are from a vocabulary of
        ``vocab_size``, of which this device may hold a part.
        """
        shape = (self.schedule.m, batch, length)

        def make() -> tuple[Any, dict[str, jax.Array]]:
            return noise(self.layout.shapes()), {"tokens": ids(shape, vocab_size), "labels": ids(shape, vocab_size, 1)}

        tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
        data = {"tokens": tokens, "labels": tokens}
        repeats = jax.ShapeDtypeStruct((len(self.instructions) + 1,), jnp.int32)
        run = self.jit(self.repeat)
        where = NamedSharding(self.mesh, PartitionSpec())
        made = jax.jit(make, out_shardings=(self.shardings, where)).lower().compile()
        return run.lower(self.layout.shapes(), data, repeats).compile(), made

    def repeat(self, params: Any, batch: Any, repeats: jax.Array) -> jax.Array:
        """The sum of one element of everything left at the end."""
        batch = checked(batch, self.schedule.m, 1, self.model)
        run = jax.shard_map(
            self._on_this_device,
            mesh=self.mesh,
            in_specs=(self.layout.specs(), jax.tree.map(lambda _: PartitionSpec(), batch), PartitionSpec()),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        return run(params, batch, repeats)

    def _on_this_device(self, params: Any, batch: Any, repeats: jax.Array) -> jax.Array:
        with exact_products(self.compute_dtype):
            return self._repeated(params, batch, repeats)

    def _repeated(self, params: Any, batch: Any, repeats: jax.Array) -> jax.Array:
        executor = self._executor(self.program, False, params, batch)
        state = executor.initial_state() | {"swept": jnp.zeros(self.swept, jnp.float32)}
        if self.layout.sharded:
            state["part"] = jnp.zeros(executor.x.shape, executor.x.dtype)
        state = {n: s if n.startswith(EMPTY) else noise(_shapes(s), 1.0) for n, s in state.items()}
        for n, instructions in enumerate([*self.instructions.values(), ()]):
            state = jax.lax.fori_loop(0, repeats[n], partial(self._once, executor, instructions), state)
        read = [x.reshape(-1)[0] for x in jax.tree.leaves(state)]
        return jnp.stack([jnp.where(jnp.isfinite(x), x, 0).astype(jnp.float32) for x in read]).sum()

    def _once(self, executor: Executor, instructions: tuple[Instruction, ...], i: jax.Array, state: State) -> State:
        state = state | {"swept": state["swept"] + 1}
        if not instructions:
            # A loop that is not entered, like the one around every pass on devices whose turn it is not.
            return run_if(state["clock"] < 0, state, ("swept",), lambda s: s | {"swept": s["swept"] * 2})
        for instruction in instructions:
            cells = {name: jnp.asarray(i % self._cells(name), jnp.int32) for name in instruction.tables}
            state = executor.execute(instruction, cells, state)
        return state

    def _cells(self, table: str) -> int:
        return self.schedule.m if table == "microbatch" else self.program.rings[RINGS.get(table, table)]


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def times(
    passes: Passes, program: Any, params: Any, batch: Any, repeats: int, enough: float = 0.015
) -> dict[str, float]:
    """Seconds of every pass: the time that more repeats add to a run, minus that of the sweeps between them.

    Args:
        enough: seconds that the repeats of a pass should take together.
    """
    names = [*passes.instructions, IDLE]

    def run(k: int, count: int) -> float:
        counts = jnp.asarray(np.eye(len(names), dtype=np.int32)[k] * count)
        return seconds(lambda: program(params, batch, counts))

    def added(k: int, count: int, rounds: int) -> float:
        return middle(run(k, count) - run(k, 0) for _ in range(rounds)) / count

    jax.block_until_ready(program(params, batch, jnp.ones(len(names), jnp.int32)))
    idle = added(len(names) - 1, 64, repeats)
    found = {IDLE: idle}
    for k, name in enumerate(names[:-1]):
        rough = max(added(k, 2, 1), 1e-6)
        found[name] = added(k, int(np.clip(enough / rough, 2, 128)), repeats) - idle
    return found
