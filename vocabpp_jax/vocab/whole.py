"""The output layer of a table that is whole on one device: forward and backward in one pass, tokens in blocks.

Shapes: N tokens, D model width, R rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from .loss import Loss
from .output_layer import (
    Shard,
    input_gradient,
    local_softmax,
    logit_gradient,
    logits,
    losses,
    slopes,
    weight_gradient,
    z_factor,
)

LOGITS, GRADIENTS = 2**26, 2**28  # elements of the logits, and of their gradient, that are worked on at once
Tokens = tuple[jax.Array, jax.Array, jax.Array]  # x [N, D], labels [N], weight [N]


def whole_layer(
    tokens: Tokens, w: jax.Array, shard: Shard, total: jax.Array, loss: Loss
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The weighted sum of losses, ``total`` with ∇W added, and ∇X ``[N, D]``.

    Beside the results no more lies about than :data:`LOGITS` float32 logits and :data:`GRADIENTS` elements of their
    gradient.
    """

    def of_logits(part: Tokens) -> tuple[jax.Array, jax.Array]:
        x, labels, weight = part
        y = logits(w, x, shard, loss)
        p, stats = local_softmax(y, labels, shard, w.dtype, loss)
        at = slopes(y, labels, shard, w.dtype, loss)
        dy = logit_gradient(p, z_factor(stats, loss), weight, labels, shard, loss, at)
        return jnp.sum(weight * losses(stats, loss)), dy

    def of_gradients(carry: tuple, part: Tokens) -> tuple[tuple, jax.Array]:
        value, dy = lax.map(of_logits, _blocks(part, w.shape[0], LOGITS))
        dy = dy.reshape(-1, w.shape[0])
        return (carry[0] + value.sum(), weight_gradient(carry[1], dy, part[0])), input_gradient(dy, w)

    start = (jnp.zeros((), jnp.float32), total)
    (value, total), dx = lax.scan(of_gradients, start, _blocks(tokens, w.shape[0], GRADIENTS))
    return value, total, dx.reshape(tokens[0].shape)


def whole_loss(tokens: Tokens, w: jax.Array, shard: Shard, loss: Loss) -> jax.Array:
    """The weighted sum of losses alone."""

    def of_logits(part: Tokens) -> jax.Array:
        x, labels, weight = part
        _, stats = local_softmax(logits(w, x, shard, loss), labels, shard, w.dtype, loss)
        return jnp.sum(weight * losses(stats, loss))

    return lax.map(of_logits, _blocks(tokens, w.shape[0], LOGITS)).sum()


def _blocks(tokens: Tokens, rows: int, elements: int) -> Tokens:
    """Tokens cut into as few equal blocks as have no more logits, of ``rows`` rows, than ``elements``."""
    n = len(tokens[0])
    count = next(k for k in range(1, n + 1) if n % k == 0 and (n // k * rows <= elements or k == n))
    return tuple(a.reshape(count, n // count, *a.shape[1:]) for a in tokens)
