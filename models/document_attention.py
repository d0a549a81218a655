"""Attention within documents by a fused kernel with a bias, without a full L × L mask in memory.

cuDNN's flash attention learns about documents through a bias per pair of positions: L × L for a row of length L. (Its
packed layout takes document boundaries instead, but jax.nn.dot_product_attention does not expose it, it needs Hopper or
later, and its residuals grow by a factor of the maximum number of documents per row.) So queries go through the kernel
in blocks, one after the other, each with the keys up to the end of its run of blocks and its own bias. The backward
recomputes each block and keeps no residuals of it.

Shapes, all per device: B batch, L length, Q queries of a block, M keys, H heads, G heads of keys and values, K width.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax

F32 = jnp.float32
_QUERIES = 512  # largest number of queries in a block
_RUNS = 4  # of blocks that share their keys; computes (1 + 1 / runs) times the L² / 2 products needed
_MULTIPLE = 8  # cuDNN needs even bias lengths; full vectors are faster


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend_in_documents(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array, implementation: str) -> jax.Array:
    """Causal attention of ``q [B, L, H, K]`` to ``k`` and ``v [B, L, G, K]`` where ``ids [B, L]`` agree.

    ``implementation`` is that of :func:`jax.nn.dot_product_attention`. Any L works.
    """
    return _forward(q, k, v, ids, implementation)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array, implementation: str) -> tuple:
    length, size, count = q.shape[1], *_blocks(q.shape[1])
    wide = [_padded(a, size * count) for a in (q, k, v, ids)]

    def block(n: jax.Array, keys: int) -> jax.Array:
        q, k, v, seen = _of_block(wide, n, size, keys)
        return _attended(q, k, v, seen, implementation)

    made = [lax.map(functools.partial(block, keys=keys), blocks) for blocks, keys in _runs(size, count)]
    a_nBQHK = jnp.concatenate(made)
    return _joined(a_nBQHK)[:, :length], (q, k, v, ids)


def _backward(implementation: str, residual: tuple, g: jax.Array) -> tuple:
    q, k, v, ids = residual
    length, size, count = q.shape[1], *_blocks(q.shape[1])
    wide, g = [_padded(a, size * count) for a in residual], _padded(g, size * count)
    dq, totals = [], (jnp.zeros(wide[1].shape, F32), jnp.zeros(wide[2].shape, F32))
    for blocks, keys in _runs(size, count):

        def block(totals: tuple, n: jax.Array, keys: int = keys) -> tuple[tuple, jax.Array]:
            q, k, v, seen = _of_block(wide, n, size, keys)
            _, vjp = jax.vjp(lambda q, k, v: _attended(q, k, v, seen, implementation), q, k, v)
            dq, *dkv = vjp(lax.dynamic_slice_in_dim(g, n * size, size, axis=1))
            return tuple(t.at[:, :keys].add(d.astype(F32)) for t, d in zip(totals, dkv, strict=True)), dq

        totals, made = lax.scan(block, totals, blocks)
        dq.append(made)
    dk, dv = (t[:, :length].astype(a.dtype) for t, a in zip(totals, (k, v), strict=True))
    return _joined(jnp.concatenate(dq))[:, :length], dk, dv, None


attend_in_documents.defvjp(_forward, _backward)


def _blocks(length: int) -> tuple[int, int]:
    """The block size in queries, and how many blocks cover ``length``."""
    count = -(-length // _QUERIES)
    return -(-length // (count * _MULTIPLE)) * _MULTIPLE, count


def _runs(size: int, count: int) -> Iterator[tuple[jax.Array, int]]:
    """Runs of blocks that share their keys, and the number of keys: enough for every query in the run."""
    runs = min(_RUNS, count)
    for n in range(runs):
        start, stop = count * n // runs, count * (n + 1) // runs
        yield jnp.arange(start, stop), stop * size


def _padded(x: jax.Array, length: int) -> jax.Array:
    """Pad the end with zeros. No real query sees the padding, and the outputs of padded queries are ignored."""
    return jnp.pad(x, [(0, length - n if axis == 1 else 0) for axis, n in enumerate(x.shape)])


def _of_block(wide: list[jax.Array], n: jax.Array, size: int, keys: int) -> tuple[jax.Array, ...]:
    """The queries of block ``n``, its keys and values, and the mask ``[B, 1, Q, M]``."""
    q, k, v, ids = wide
    first = n * size
    own = lax.dynamic_slice_in_dim(ids, first, size, axis=1)
    causal = first + jnp.arange(size)[:, None] >= jnp.arange(keys)
    seen = causal & (own[:, :, None] == ids[:, None, :keys])
    return lax.dynamic_slice_in_dim(q, first, size, axis=1), k[:, :keys], v[:, :keys], seen[:, None]


def _attended(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, implementation: str) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, mask=seen, implementation=implementation)


def _joined(blocks: jax.Array) -> jax.Array:
    """``[n, B, Q, H, K] -> [B, nQ, H, K]``."""
    joined = jnp.moveaxis(blocks, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])
