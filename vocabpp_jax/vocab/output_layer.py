"""The output layer and its loss, sharded by vocabulary rows (Sections 4.1 to 4.4).

On shard k, with ``Y = X W_kᵀ`` and the one-hot labels ``G``, local quantities are primed::

    m' = max Y      sum' = Σ exp(Y - m')      P' = exp(Y - m') / sum'
    m  = max m'     sum  = Σ sum' e^(m' - m)  softmax = P' · (sum' e^(m' - m) / sum)
    loss = log sum + m - Y[label]     ∇X = Σ_k (softmax - G) W_k     ∇W_k = (softmax - G)ᵀ X

Everything that differs between shards once the global m and sum are known is one factor a row. That is why the
barriers can be moved: Algorithm 1 exchanges m' and sum' before the matrix products of the backward, Algorithm 2
computes ``P' W_k`` before and rescales its rows after. Maxima, sums, factors and losses are float32.

Shapes, per device: N tokens, D model width, R rows of the local shard. ``weight [N]`` is the loss mask over the
global count of valid tokens, so that gradients come out normalised.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

F32 = jnp.float32
LOGITS, GRADIENTS = 2**26, 2**28  # elements of an unsharded output layer that are worked on at once


class Shard(NamedTuple):
    """Which rows of the vocabulary a device holds: ``first_row``, and how many rows exist at all."""

    first_row: jax.Array | int
    vocab_size: int


class Stats(NamedTuple):
    """Row statistics ``[N]`` in float32: maximum, sum of exponentials below it, the label's logit (0 if elsewhere)."""

    maximum: jax.Array
    sum: jax.Array
    target: jax.Array


def _one_hot_mask(labels: jax.Array, shard: Shard, rows: int) -> jax.Array:
    return labels[:, None] - shard.first_row == lax.broadcasted_iota(jnp.int32, (1, rows), 1)


def logits(w: jax.Array, x: jax.Array, shard: Shard) -> jax.Array:
    """``Y [N, R]`` in float32; rows of the padding are -inf, so that any V gives the unpadded loss."""
    y = lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=F32)
    row = shard.first_row + lax.broadcasted_iota(jnp.int32, (1, w.shape[0]), 1)
    return jnp.where(row < shard.vocab_size, y, -jnp.inf)


def local_softmax(y: jax.Array, labels: jax.Array, shard: Shard, dtype: jnp.dtype) -> tuple[jax.Array, Stats]:
    """S: ``P' [N, R]`` in ``dtype`` and the local statistics. A shard that is all padding has P' = 0, sum' = 0."""
    maximum = jnp.max(y, axis=1)
    e = jnp.exp(y - jnp.where(jnp.isfinite(maximum), maximum, 0)[:, None])
    total = jnp.sum(e, axis=1)
    p = e / jnp.where(total > 0, total, 1)[:, None]
    return p.astype(dtype), Stats(maximum, total, target_logits(y, labels, shard))


def target_logits(y: jax.Array, labels: jax.Array, shard: Shard) -> jax.Array:
    """``Y[label] [N]`` where the label is in this shard, 0 elsewhere."""
    return jnp.sum(jnp.where(_one_hot_mask(labels, shard, y.shape[1]), y, 0), axis=1)


def combine(of_shards: Stats) -> Stats:
    """The global statistics from those of all shards, stacked ``[shards, N]``."""
    maximum = jnp.max(of_shards.maximum, axis=0)
    total = jnp.sum(of_shards.sum * jnp.exp(of_shards.maximum - maximum), axis=0)
    return Stats(maximum, total, jnp.sum(of_shards.target, axis=0))


def factor(local: Stats, whole: Stats) -> jax.Array:
    """``sum' e^(m' - m) / sum [N]``: what turns P' into the softmax."""
    return local.sum * jnp.exp(local.maximum - whole.maximum) / whole.sum


def losses(whole: Stats) -> jax.Array:
    """Cross entropy of every token ``[N]``."""
    return jnp.log(whole.sum) + whole.maximum - whole.target


def logit_gradient(p: jax.Array, scale: jax.Array, weight: jax.Array, labels: jax.Array, shard: Shard) -> jax.Array:
    """``(softmax - G) · weight [N, R]`` in P's dtype."""
    hot = _one_hot_mask(labels, shard, p.shape[1])
    return ((p * scale[:, None] - hot) * weight[:, None]).astype(p.dtype)


def unsharded(
    x: jax.Array, w: jax.Array, labels: jax.Array, weight: jax.Array, shard: Shard, total: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The output layer of a table that is whole: weighted sum of losses, ``total`` with ∇W added, and ∇X ``[N, D]``.

    Tokens go through in blocks, so that beside the result no more lies about than :data:`LOGITS` float32 logits and
    :data:`GRADIENTS` elements of their gradient.
    """

    def of_logits(part: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        x, labels, weight = part
        p, stats = local_softmax(logits(w, x, shard), labels, shard, w.dtype)
        return jnp.sum(weight * losses(stats)), logit_gradient(p, jnp.ones_like(weight), weight, labels, shard)

    def of_gradients(carry: tuple, part: tuple[jax.Array, ...]) -> tuple[tuple, jax.Array]:
        loss, dy = lax.map(of_logits, _blocks(part, w.shape[0], LOGITS))
        dy = dy.reshape(-1, w.shape[0])
        return (carry[0] + loss.sum(), weight_gradient(carry[1], dy, part[0])), input_gradient(dy, w)

    blocks = _blocks((x, labels, weight), w.shape[0], GRADIENTS)
    (loss, total), dx = lax.scan(of_gradients, (jnp.zeros((), F32), total), blocks)
    return loss, total, dx.reshape(x.shape)


def unsharded_loss(x: jax.Array, w: jax.Array, labels: jax.Array, weight: jax.Array, shard: Shard) -> jax.Array:
    """The weighted sum of losses alone, in the same blocks."""

    def of_logits(part: tuple[jax.Array, ...]) -> jax.Array:
        x, labels, weight = part
        return jnp.sum(weight * losses(local_softmax(logits(w, x, shard), labels, shard, w.dtype)[1]))

    return lax.map(of_logits, _blocks((x, labels, weight), w.shape[0], LOGITS)).sum()


def _blocks(arrays: tuple[jax.Array, ...], rows: int, elements: int) -> tuple[jax.Array, ...]:
    """Token arrays cut into as few equal blocks as have no more logits, of ``rows`` rows, than ``elements``."""
    n = len(arrays[0])
    count = next(k for k in range(1, n + 1) if n % k == 0 and (n // k * rows <= elements or k == n))
    return tuple(a.reshape(count, n // count, *a.shape[1:]) for a in arrays)


def weight_gradient(accumulated: jax.Array, dy: jax.Array, x: jax.Array) -> jax.Array:
    """T: ``accumulated + dYᵀ X [R, D]`` in float32."""
    return accumulated + lax.dot_general(dy, x, (((0,), (0,)), ((), ())), preferred_element_type=F32)


def input_gradient(dy: jax.Array, w: jax.Array) -> jax.Array:
    """T of Algorithm 1: this shard's part of ∇X ``[N, D]``, ready to be summed over shards."""
    return lax.dot_general(dy, w, (((1,), (0,)), ((), ())), preferred_element_type=F32).astype(w.dtype)


def unscaled_input_gradient(p: jax.Array, w: jax.Array) -> jax.Array:
    """S of Algorithm 2: ``A = P' W_k [N, D]``, before the global sums are known."""
    return lax.dot_general(p, w, (((1,), (0,)), ((), ())), preferred_element_type=F32).astype(w.dtype)


def partial_input_gradient(
    a: jax.Array, w: jax.Array, scale: jax.Array, weight: jax.Array, labels: jax.Array, shard: Shard
) -> jax.Array:
    """C1 of Algorithm 2: ``(A · scale - G W_k) · weight [N, D]``, ready to be summed over shards."""
    local = labels - shard.first_row
    mine = (local >= 0) & (local < w.shape[0])
    gw = jnp.where(mine[:, None], w[jnp.where(mine, local, 0)], 0)
    return ((a * scale[:, None] - gw) * weight[:, None]).astype(a.dtype)
