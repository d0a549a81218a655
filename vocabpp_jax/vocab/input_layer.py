"""The input layer, sharded by vocabulary rows: a masked lookup and its transpose (IF and IB, Appendix C).

Shapes, per device: N tokens, D model width, R rows of the local shard.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def lookup(table: jax.Array, ids: jax.Array, first_row: jax.Array | int) -> jax.Array:
    """IF: rows ``ids [...]`` of the whole table that are in the local shard ``[R, D]``, zeros for the others.

    The sum over shards is the embedding; exactly one shard adds something that is not zero.
    """
    local = ids - first_row
    mine = (local >= 0) & (local < table.shape[0])
    return jnp.where(mine[..., None], table[jnp.where(mine, local, 0)], 0)


def scatter(gradient: jax.Array, ids: jax.Array, first_row: jax.Array | int, g: jax.Array) -> jax.Array:
    """IB: adds ``g [..., D]`` to rows ``ids [...]`` of the local gradient ``[R, D]``; other shards' are dropped."""
    rows = gradient.shape[0]
    local = ids - first_row
    local = jnp.where((local >= 0) & (local < rows), local, rows)
    return gradient.at[local].add(g.astype(gradient.dtype), mode="drop")
