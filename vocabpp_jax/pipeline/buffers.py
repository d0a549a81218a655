"""Ring buffers, and passes that run or do not: the two things that every instruction is made of.

A ring is a pytree of arrays ``[cells, ...]``. State is a flat dictionary; a pass names the entries it updates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

State = dict[str, Any]
Cells = dict[str, jax.Array]


def run_if(condition: jax.Array, state: State, names: tuple[str, ...], update: Callable[[State], State]) -> State:
    """``state`` with ``names`` as ``update`` leaves them, where ``condition``; the rest of the state is only read.

    A loop of zero or one trips, not a conditional: XLA carries what a loop updates in place, where every branch of a
    conditional copies what it passes through. No collective may be inside.

    All passes share ``clock``, the count of those that ran. It keeps them in the program's order: without it nothing
    orders one that reads a buffer before another that overwrites it, and the compiler copies the buffer.
    """
    names = ("clock", *names)
    _, updated = lax.while_loop(
        lambda carry: carry[0],
        lambda carry: (jnp.zeros((), bool), _ticked({n: v for n, v in update(state | carry[1]).items() if n in names})),
        (condition, {n: state[n] for n in names}),
    )
    return state | updated


def _ticked(state: State) -> State:
    return state | {"clock": state["clock"] + 1}


def passes_wait_for(state: State, value: jax.Array) -> State:
    """Makes every later pass wait until ``value`` is there, as a stream of instructions would.

    The compiler orders by data alone, and drops a barrier before it schedules. So the clock reads one element.
    """
    first = value.reshape(-1)[0]
    return state | {"clock": jnp.where(first == first, state["clock"], state["clock"] + 1)}


def wait_for_passes(state: State, value: jax.Array) -> jax.Array:
    """``value``, not to be used before the earlier passes have run."""
    return jnp.where(state["clock"] >= 0, value, jnp.zeros_like(value))


def delay_until(cell: jax.Array, values: Any) -> jax.Array:
    """``cell``, not to be read before all matrices of ``values`` are there.

    It keeps the compiler from fetching early what would then take memory until it is used. Where a value is NaN another
    cell may be read, into what is NaN already.

    The barrier keeps XLA from fusing the read with what makes ``values``, which it does where both have as many
    elements. Every thread of such a kernel would need the first element of a matrix that the kernel replaces, so it
    could not replace it in place: gradients that are added to were copied first.
    """
    firsts = [v.reshape(-1)[0] for v in lax.optimization_barrier([v for v in jax.tree.leaves(values) if v.ndim > 1])]
    if not firsts:
        return cell
    there = jnp.all(jnp.stack([first == first for first in firsts]))
    return jnp.where(there, cell, 0)


def get(ring: Any, cell: jax.Array) -> Any:
    """One cell of a ring."""
    return jax.tree.map(lambda r: r[0] if r.shape[0] == 1 else lax.dynamic_index_in_dim(r, cell, keepdims=False), ring)


def put(ring: Any, cell: jax.Array, value: Any) -> Any:
    """The ring with one cell replaced, in place inside a compiled program."""
    return jax.tree.map(
        lambda r, v: v[None] if r.shape[0] == 1 else lax.dynamic_update_index_in_dim(r, v, cell, 0), ring, value
    )


def put_if(ring: Any, cell: jax.Array, value: Any) -> Any:
    """The ring with one cell replaced where ``cell`` is not negative."""
    at = jnp.maximum(cell, 0)
    return put(ring, at, jax.tree.map(lambda v, old: jnp.where(cell >= 0, v, old), value, get(ring, at)))


def zeros(cells: int, shapes: Any) -> Any:
    """A ring of ``cells`` for a tree of shapes."""
    return jax.tree.map(lambda s: jnp.zeros((cells, *s.shape), s.dtype), shapes)


def replaced(items: tuple, j: int, item: Any) -> tuple:
    """The tuple with one entry replaced."""
    return (*items[:j], item, *items[j + 1 :])


def accumulated(total: Any, gradients: Any) -> Any:
    """Adds gradients in float32; None where this pass makes none."""
    return jax.tree.map(
        lambda g, t: t if g is None else t + g.astype(jnp.float32), gradients, total, is_leaf=lambda g: g is None
    )
