"""The output layer and its loss, sharded by vocabulary rows (Sections 4.1 to 4.4).

On shard k, with ``Y = X W_kᵀ`` and the one-hot labels ``G``, local quantities are primed::

    m' = max Y      P' = exp(Y - m')          sum' = Σ P'
    m  = max m'     sum  = Σ sum' e^(m' - m)  softmax = P' · f,  f = e^(m' - m) / sum
    loss = log sum + m - Y[label]     ∇X = Σ_k (softmax - G) W_k     ∇W_k = (softmax - G)ᵀ X

Everything that differs between shards once the global m and sum are known is one factor a row, f. That is why the
barriers can be moved: Algorithm 1 exchanges m' and sum' before the matrix products of the backward, Algorithm 2
computes ``P' W_k`` before and rescales its rows after. (The paper divides P' by sum' and puts sum' into f.) And that is
why no matrix of ``softmax - G`` is made: its products are those of P' with f on the rows of the other factor or of the
result, less one row of W, or of X, for every token. Maxima, sums, factors and losses are float32.

**The extensions of** :class:`~.loss.Loss` keep that. With raw logits ``U = X Wᵀ``, ``Y = c tanh(U / c)``, the slope
``∂ = dY/dU = 1 - (Y/c)²``, the smoothed target ``G' = (1-ε) G + ε/V`` and ``lse = log sum + m``::

    loss = lse (1 + λ lse) - Σ G' Y      dY = (1 + 2λ lse) softmax - G'      dU = dY ∘ ∂

* z-loss is a factor a row, ``1 + 2λ lse``, known after the one barrier: it joins the factor that rescales P', which
  has the token's weight in it too.
* The soft cap is a factor an element, known before it: S stores ``P' ∘ ∂`` for P', and ``A = (P' ∘ ∂) W_k``.
* Smoothing changes what is subtracted, ``G' ∘ ∂``, which no barrier has a part in. ``Σ G' Y`` adds up over shards where
  ``Y[label]`` did. Its uniform part in ∇X is ``ε/V Σ_rows ∂ W``: without a cap one vector for all tokens and
  microbatches, with a cap one more product in S (and ∂ is stored for T, which then makes the whole matrix).

So each algorithm has the barriers it had. Rows of the padding have ``Y = -inf`` and ``∂ = 0``.

Shapes, per device: N tokens, D model width, R rows of the local shard. ``weight [N]`` is the loss mask over the
global count of valid tokens, so that gradients come out normalised.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .input_layer import lookup, scatter
from .loss import Loss

F32 = jnp.float32
PLAIN = Loss()


class Shard(NamedTuple):
    """Which rows of the vocabulary a device holds: ``first_row``, and how many rows exist at all."""

    first_row: jax.Array | int
    vocab_size: int


class Stats(NamedTuple):
    """Row statistics ``[N]`` in float32: maximum, sum of exponentials below it, ``Σ G' Y`` over the local rows."""

    maximum: jax.Array
    sum: jax.Array
    target: jax.Array


class Slopes(NamedTuple):
    """The soft cap's slope ∂ at the label ``[N]``, and at every row ``[N, R]`` where smoothing needs it, else None."""

    label: jax.Array
    rows: jax.Array | None


class Target(NamedTuple):
    """What the tokens are to be and how much they count: all of their gradient that no barrier has a part in.

    ``weight`` and ``labels`` are ``[N]``.
    """

    weight: jax.Array
    labels: jax.Array
    shard: Shard
    loss: Loss = PLAIN
    slopes: Slopes | None = None

    @property
    def at_label(self) -> jax.Array:
        """``(1-ε) ∂ · weight`` at the label, ``[N]``."""
        share = (1 - self.loss.label_smoothing) * self.weight
        return share if self.slopes is None else share * self.slopes.label

    @property
    def at_rows(self) -> float:
        """``ε/V``, which multiplies ∂ at every row."""
        return self.loss.label_smoothing / self.shard.vocab_size


def _one_hot_mask(labels: jax.Array, shard: Shard, rows: int) -> jax.Array:
    # Labels of padding rows, which a masked token may have, hit nothing: 0 times their -inf would be NaN.
    local = jnp.where(labels < shard.vocab_size, labels - shard.first_row, -1)
    return local[:, None] == lax.broadcasted_iota(jnp.int32, (1, rows), 1)


def _exists(shard: Shard, rows: int) -> jax.Array:
    """``[1, R]``: which rows are not padding."""
    return shard.first_row + lax.broadcasted_iota(jnp.int32, (1, rows), 1) < shard.vocab_size


def logits(w: jax.Array, x: jax.Array, shard: Shard, loss: Loss = PLAIN) -> jax.Array:
    """``Y [N, R]`` in float32; rows of the padding are -inf, so that any V gives the unpadded loss."""
    y = lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=F32)
    if loss.soft_cap is not None:
        y = loss.soft_cap * jnp.tanh(y / loss.soft_cap)
    return jnp.where(_exists(shard, w.shape[0]), y, -jnp.inf)


def capped(p: jax.Array, y: jax.Array, loss: Loss) -> jax.Array:
    """``P' ∘ ∂``: what the softmax contributes to the gradient of the raw logits; P' itself without a cap."""
    return p if loss.soft_cap is None else p * _slope(y, loss)


def slopes(y: jax.Array, labels: jax.Array, shard: Shard, dtype: jnp.dtype, loss: Loss) -> Slopes | None:
    """What the target's part of the gradient needs of the logits, every row in ``dtype``; None without a cap."""
    if loss.soft_cap is None:
        return None
    slope = _slope(y, loss)
    at_label = jnp.sum(jnp.where(_one_hot_mask(labels, shard, y.shape[1]), slope, 0), axis=1)
    return Slopes(at_label, slope.astype(dtype) if loss.label_smoothing else None)


def _slope(y: jax.Array, loss: Loss) -> jax.Array:
    return jnp.where(y > -jnp.inf, 1 - jnp.square(y / loss.soft_cap), 0)


def exponentials(
    y: jax.Array, labels: jax.Array, shard: Shard, dtype: jnp.dtype, loss: Loss = PLAIN
) -> tuple[jax.Array, Stats]:
    """S: ``P' ∘ ∂ [N, R]`` in ``dtype`` and the local statistics. A shard of padding alone has P' = 0, sum' = 0."""
    maximum = jnp.max(y, axis=1)
    e = jnp.exp(y - jnp.where(jnp.isfinite(maximum), maximum, 0)[:, None])
    return capped(e, y, loss).astype(dtype), Stats(maximum, jnp.sum(e, axis=1), target_logits(y, labels, shard, loss))


def target_logits(y: jax.Array, labels: jax.Array, shard: Shard, loss: Loss = PLAIN) -> jax.Array:
    """``Σ G' Y [N]`` over the local rows: without smoothing ``Y[label]`` where the label is here, 0 elsewhere."""
    at_label = jnp.sum(jnp.where(_one_hot_mask(labels, shard, y.shape[1]), y, 0), axis=1)
    if not loss.label_smoothing:
        return at_label
    uniform = jnp.sum(jnp.where(y > -jnp.inf, y, 0), axis=1) / shard.vocab_size
    return (1 - loss.label_smoothing) * at_label + loss.label_smoothing * uniform


def combine(of_shards: Stats) -> Stats:
    """The global statistics from those of all shards, stacked ``[shards, N]``."""
    maximum = jnp.max(of_shards.maximum, axis=0)
    total = jnp.sum(of_shards.sum * jnp.exp(of_shards.maximum - maximum), axis=0)
    return Stats(maximum, total, jnp.sum(of_shards.target, axis=0))


def factor(local: Stats, whole: Stats, weight: jax.Array, loss: Loss = PLAIN) -> jax.Array:
    """``f (1 + 2λ lse) weight [N]``: it turns P' into the weighted gradient of ``lse + λ lse²``."""
    f = jnp.exp(local.maximum - whole.maximum) / whole.sum * weight
    return f * (1 + 2 * loss.z_loss * _lse(whole)) if loss.z_loss else f


def losses(whole: Stats, loss: Loss = PLAIN) -> jax.Array:
    """The loss of every token ``[N]``."""
    lse = _lse(whole)
    return lse - whole.target + (loss.z_loss * lse**2 if loss.z_loss else 0)


def _lse(whole: Stats) -> jax.Array:
    return jnp.log(whole.sum) + whole.maximum


def weight_gradient(accumulated: jax.Array, p: jax.Array, x: jax.Array, scale: jax.Array, target: Target) -> jax.Array:
    """T: ``accumulated + dUᵀ X [R, D]`` in float32, from ``P' ∘ ∂`` and its factor."""
    matrix, rows = _softmax_part(p, scale, target)
    weighted = (x.astype(F32) * rows[:, None]).astype(x.dtype)
    product = lax.dot_general(matrix.astype(x.dtype), weighted, (((0,), (0,)), ((), ())), preferred_element_type=F32)
    total = accumulated + product
    if target.loss.label_smoothing and target.slopes is None:
        uniform = target.at_rows * jnp.sum(target.weight[:, None] * x.astype(F32), axis=0)
        total -= jnp.where(_exists(target.shard, len(total)).T, uniform, 0)
    return scatter(total, target.labels, target.shard.first_row, -target.at_label[:, None] * x.astype(F32))


def input_gradient(
    p: jax.Array, w: jax.Array, scale: jax.Array, target: Target, uniform: jax.Array | None = None
) -> jax.Array:
    """T of Algorithm 1: this shard's part of ∇X ``[N, D]``, ready to be summed over shards.

    ``uniform`` is :func:`uniform_input_gradient` where labels are smoothed and no cap is.
    """
    matrix, rows = _softmax_part(p, scale, target)
    return _less_target(_times(matrix.astype(w.dtype), w) * rows[:, None], w, target, uniform)


def _softmax_part(p: jax.Array, scale: jax.Array, target: Target) -> tuple[jax.Array, jax.Array]:
    """``dU`` without its labels and, where no cap is, its uniform part: a matrix, and a factor for each row."""
    if target.slopes is None or target.slopes.rows is None:
        return p, scale
    uniform = target.at_rows * target.weight
    return (p * scale[:, None] - uniform[:, None] * target.slopes.rows).astype(p.dtype), jnp.ones_like(scale)


def unscaled_input_gradient(p: jax.Array, w: jax.Array) -> jax.Array:
    """S of Algorithm 2: ``A = (P' ∘ ∂) W_k [N, D]``, before the global sums are known."""
    return _times(p, w).astype(w.dtype)


def _times(p: jax.Array, w: jax.Array) -> jax.Array:
    return lax.dot_general(p, w, (((1,), (0,)), ((), ())), preferred_element_type=F32)


def uniform_input_gradient(w: jax.Array, shard: Shard, loss: Loss, slopes: Slopes | None = None) -> jax.Array:
    """Smoothing's part of ∇X, ``ε/V Σ_rows ∂ W_k``: ``[N, D]``, or ``[1, D]`` without a cap."""
    rows = _exists(shard, w.shape[0]) if slopes is None else slopes.rows
    return loss.label_smoothing / shard.vocab_size * _times(rows.astype(w.dtype), w)


def partial_input_gradient(
    a: jax.Array, w: jax.Array, scale: jax.Array, target: Target, uniform: jax.Array | None = None
) -> jax.Array:
    """C1 of Algorithm 2: ``A · scale - (G'∘∂) W_k · weight [N, D]``, ready to be summed over shards.

    ``uniform`` is :func:`uniform_input_gradient` where labels are smoothed.
    """
    return _less_target(a * scale[:, None], w, target, uniform)


def _less_target(a: jax.Array, w: jax.Array, target: Target, uniform: jax.Array | None) -> jax.Array:
    """``a`` less the target's part of ∇X, in the dtype of ``w``."""
    a = a - lookup(w, target.labels, target.shard.first_row) * target.at_label[:, None]
    if uniform is not None:
        a = a - uniform * target.weight[:, None]
    return a.astype(w.dtype)
