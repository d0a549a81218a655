"""Ring buffers and conditional passes, the building blocks of every instruction.

A ring is a pytree of arrays ``[cells, ...]``. State is a flat dictionary; a pass declares which entries it updates.
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
    """Applies ``update`` to the entries ``names`` of ``state`` if ``condition`` holds; all other entries are read-only.

    Implemented as a loop of zero or one trips rather than a conditional: XLA updates a loop's carry in place, while
    every branch of a conditional copies what it passes through. ``update`` must not contain collectives.

    All passes share ``clock``, the number of passes run so far. It keeps them in program order: otherwise nothing
    orders a pass that reads a buffer before one that overwrites it, and the compiler copies the buffer.
    """
    names = ("clock", *names)
    _, updated = lax.while_loop(
        lambda carry: carry[0],
        lambda carry: (jnp.zeros((), bool), _tick({n: v for n, v in update(state | carry[1]).items() if n in names})),
        (condition, {n: state[n] for n in names}),
    )
    return state | updated


def _tick(state: State) -> State:
    return state | {"clock": state["clock"] + 1}


def passes_wait_for(state: State, value: jax.Array) -> State:
    """Makes every later pass wait for ``value``, as on an in-order stream.

    The compiler orders by data dependencies alone and drops optimization barriers before scheduling, so the clock is
    made to depend on one element.
    """
    first = value.reshape(-1)[0]
    return state | {"clock": jnp.where(first == first, state["clock"], state["clock"] + 1)}


def wait_for_passes(state: State, value: jax.Array) -> jax.Array:
    """``value``, made to depend on all earlier passes."""
    return jnp.where(state["clock"] >= 0, value, jnp.zeros_like(value))


def delay_until(cell: jax.Array, values: Any) -> jax.Array:
    """``cell``, made to depend on all matrices in ``values``.

    This keeps the compiler from reading the cell early, which would allocate its contents until they are used. If a
    value is NaN a different cell may be read, but then the results are NaN already.

    The barrier keeps XLA from fusing the read with the computation of ``values``, which it does when both have the same
    number of elements. Every thread of such a kernel would need the first element of a matrix that the kernel itself
    overwrites, so it could not run in place, and accumulated gradients would be copied first.
    """
    firsts = [v.reshape(-1)[0] for v in lax.optimization_barrier([v for v in jax.tree.leaves(values) if v.ndim > 1])]
    if not firsts:
        return cell
    ready = jnp.all(jnp.stack([first == first for first in firsts]))
    return jnp.where(ready, cell, 0)


def get(ring: Any, cell: jax.Array) -> Any:
    """Reads one cell of a ring."""
    return jax.tree.map(lambda r: r[0] if r.shape[0] == 1 else lax.dynamic_index_in_dim(r, cell, keepdims=False), ring)


def put(ring: Any, cell: jax.Array, value: Any) -> Any:
    """The ring with one cell overwritten; in place in compiled code."""
    return jax.tree.map(
        lambda r, v: v[None] if r.shape[0] == 1 else lax.dynamic_update_index_in_dim(r, v, cell, 0), ring, value
    )


def put_if(ring: Any, cell: jax.Array, value: Any) -> Any:
    """The ring with one cell overwritten, unless ``cell`` is negative."""
    at = jnp.maximum(cell, 0)
    return put(ring, at, jax.tree.map(lambda v, old: jnp.where(cell >= 0, v, old), value, get(ring, at)))


def zeros(cells: int, shapes: Any) -> Any:
    """A ring of ``cells`` zero cells, each a tree of the given shapes."""
    return jax.tree.map(lambda s: jnp.zeros((cells, *s.shape), s.dtype), shapes)


def replaced(items: tuple, j: int, item: Any) -> tuple:
    """The tuple with entry ``j`` replaced."""
    return (*items[:j], item, *items[j + 1 :])


def accumulated(total: Any, gradients: Any) -> Any:
    """``total`` plus gradients in float32; a gradient of None leaves its total unchanged."""
    return jax.tree.map(
        lambda g, t: t if g is None else t + g.astype(jnp.float32), gradients, total, is_leaf=lambda g: g is None
    )
