"""The output layer with the whole table on one device: forward and backward in one pass, over blocks of tokens.

Shapes: N tokens (of a block, inside the loops), D model width, R rows.
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

LOGITS, EXPONENTIALS = 2**26, 2**28  # most elements of each that are live at once
Tokens = tuple[jax.Array, jax.Array, jax.Array]  # x [N, D], labels [N], weight [N]


def whole_layer(
    tokens: Tokens, w_RD: jax.Array, shard: Shard, gradient_RD: jax.Array, loss: Loss
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The weighted sum of losses, ``gradient_RD`` with ∇W added, and ∇X ``[N, D]``.

    On top of its results it allocates at most :data:`LOGITS` float32 logits and :data:`EXPONENTIALS` elements of their
    exponentials (and of ∂, with both a soft cap and smoothing).
    """

    def forward(block: Tokens) -> tuple[jax.Array, Kept, Coefficients]:
        x_ND, labels_N, weight_N = block
        kept, stats = exponentials(logits(w_RD, x_ND, shard, loss), labels_N, shard, w_RD.dtype, loss)
        stats_1N = jax.tree.map(lambda vector_N: vector_N[None], stats)
        coef = coefficients(stats_1N, 0, kept, Target(weight_N, labels_N, shard, loss), w_RD.shape[0])
        return jnp.sum(weight_N * losses(stats, loss)), kept, coef

    def backward(carry: tuple, block: Tokens) -> tuple[tuple, jax.Array]:
        x_ND, labels_N, weight_N = block
        values, *stacked = lax.map(forward, _blocks(block, w_RD.shape[0], LOGITS))
        kept, coef = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), stacked)
        target = Target(weight_N, labels_N, shard, loss)
        total_RD = weight_gradient(carry[1], kept, x_ND, coef, target)
        value = carry[0] + values.sum()
        return (value, total_RD), input_gradient(kept, w_RD, coef, target, uniform).astype(w_RD.dtype)

    needs_uniform = loss.label_smoothing and loss.soft_cap is None
    uniform = uniform_input_gradient(w_RD, shard) if needs_uniform else None
    start = (jnp.zeros((), jnp.float32), gradient_RD)
    (value, gradient_RD), dx = lax.scan(backward, start, _blocks(tokens, w_RD.shape[0], EXPONENTIALS))
    return value, gradient_RD, dx.reshape(tokens[0].shape)


def whole_loss(tokens: Tokens, w_RD: jax.Array, shard: Shard, loss: Loss) -> jax.Array:
    """The weighted sum of losses alone."""

    def forward(block: Tokens) -> jax.Array:
        x_ND, labels_N, weight_N = block
        _, stats = exponentials(logits(w_RD, x_ND, shard, loss), labels_N, shard, w_RD.dtype, loss)
        return jnp.sum(weight_N * losses(stats, loss))

    return lax.map(forward, _blocks(tokens, w_RD.shape[0], LOGITS)).sum()


def _blocks(tokens: Tokens, rows: int, elements: int) -> Tokens:
    """Splits tokens into the fewest equal blocks whose logits, of ``rows`` rows, are at most ``elements``."""
    N = len(tokens[0])
    count = next(k for k in range(1, N + 1) if N % k == 0 and (N // k * rows <= elements or k == N))
    return tuple(a.reshape(count, N // count, *a.shape[1:]) for a in tokens)
