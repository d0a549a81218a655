"""The input layer, sharded by vocabulary rows: a masked lookup and its transpose (IF and IB, Appendix C).

Shapes, per device: N tokens, D model width, R rows of the local shard.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def lookup(table_RD: jax.Array, ids: jax.Array, first_row: jax.Array | int) -> jax.Array:
    """IF: the embeddings ``[..., D]`` of global row ids ``[...]``, zero for ids outside the local shard.

    Summing over shards gives the full embedding: each id is in exactly one shard.
    """
    local = ids - first_row
    mine = (local >= 0) & (local < table_RD.shape[0])
    return jnp.where(mine[..., None], table_RD[jnp.where(mine, local, 0)], 0)


def scatter(gradient_RD: jax.Array, ids: jax.Array, first_row: jax.Array | int, g: jax.Array) -> jax.Array:
    """IB: adds ``g [..., D]`` to the local gradient at global row ids ``[...]``; ids of other shards are dropped."""
    R = gradient_RD.shape[0]
    local = ids - first_row
    local = jnp.where((local >= 0) & (local < R), local, R)
    return gradient_RD.at[local].add(g.astype(gradient_RD.dtype), mode="drop")
