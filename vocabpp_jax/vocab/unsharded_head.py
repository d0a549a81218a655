"""The output layer of a table that is whole on one device: forward and backward in one pass, tokens in blocks.

Shapes: N tokens, D model width, R rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from .loss import Loss
from .output_layer import (
    Coefficients,
    Kept,
    Shard,
    Target,
    coefficients,
    exponentials,
    input_gradient,
    logits,
    losses,
    uniform_input_gradient,
    weight_gradient,
)

LOGITS, EXPONENTIALS = 2**26, 2**28  # elements of each that are worked on at once
Tokens = tuple[jax.Array, jax.Array, jax.Array]  # x [N, D], labels [N], weight [N]


def whole_layer(
    tokens: Tokens, w: jax.Array, shard: Shard, total: jax.Array, loss: Loss
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The weighted sum of losses, ``total`` with ∇W added, and ∇X ``[N, D]``.

    Beside the results it holds at most :data:`LOGITS` float32 logits and :data:`EXPONENTIALS` elements of their
    exponentials (and of ∂, with a soft cap and smoothing).
    """

    def of_logits(part: Tokens) -> tuple[jax.Array, Kept, Coefficients]:
        x, labels, weight = part
        kept, stats = exponentials(logits(w, x, shard, loss), labels, shard, w.dtype, loss)
        of_one_shard = jax.tree.map(lambda vector: vector[None], stats)
        at = coefficients(of_one_shard, 0, kept, Target(weight, labels, shard, loss), w.shape[0])
        return jnp.sum(weight * losses(stats, loss)), kept, at

    def of_gradients(carry: tuple, part: Tokens) -> tuple[tuple, jax.Array]:
        x, labels, weight = part
        value, *made = lax.map(of_logits, _blocks(part, w.shape[0], LOGITS))
        kept, at = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), made)
        target = Target(weight, labels, shard, loss)
        total = weight_gradient(carry[1], kept, x, at, target)
        return (carry[0] + value.sum(), total), input_gradient(kept, w, at, target, uniform).astype(w.dtype)

    evenly = loss.label_smoothing and loss.soft_cap is None
    uniform = uniform_input_gradient(w, shard) if evenly else None
    start = (jnp.zeros((), jnp.float32), total)
    (value, total), dx = lax.scan(of_gradients, start, _blocks(tokens, w.shape[0], EXPONENTIALS))
    return value, total, dx.reshape(tokens[0].shape)


def whole_loss(tokens: Tokens, w: jax.Array, shard: Shard, loss: Loss) -> jax.Array:
    """The weighted sum of losses alone."""

    def of_logits(part: Tokens) -> jax.Array:
        x, labels, weight = part
        _, stats = exponentials(logits(w, x, shard, loss), labels, shard, w.dtype, loss)
        return jnp.sum(weight * losses(stats, loss))

    return lax.map(of_logits, _blocks(tokens, w.shape[0], LOGITS)).sum()


def _blocks(tokens: Tokens, rows: int, elements: int) -> Tokens:
    """Tokens cut into as few equal blocks as have no more logits, of ``rows`` rows, than ``elements``."""
    n = len(tokens[0])
    count = next(k for k in range(1, n + 1) if n % k == 0 and (n // k * rows <= elements or k == n))
    return tuple(a.reshape(count, n // count, *a.shape[1:]) for a in tokens)
