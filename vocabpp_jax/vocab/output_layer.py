"""The output layer and its loss, sharded by vocabulary rows (Sections 4.1 to 4.4).

On shard k, with ``Y = X W_kᵀ`` and the one-hot labels ``G``, local quantities are primed::

    m' = max Y      P' = exp(Y - m')          sum' = Σ P'
    m  = max m'     sum  = Σ sum' e^(m' - m)  softmax = P' · f,  f = e^(m' - m) / sum
    loss = log sum + m - Y[label]     ∇X = Σ_k (softmax - G) W_k     ∇W_k = (softmax - G)ᵀ X

Everything that differs between shards once the global m and sum are known is one factor a row, f. That is why the
barriers can be moved: Algorithm 1 exchanges m' and sum' before the matrix products of the backward, Algorithm 2
computes ``P' W_k`` before and rescales its rows after. (The paper divides P' by sum' and puts sum' into f.) And that is
why no matrix of ``softmax - G`` is made: its products are those of P' with f on the rows of the other factor or of the
result, plus one row of W, or of X, for every token. Maxima, sums, factors and losses are float32.

**Nothing large cancels.** P' is rounded to the compute dtype, so the label's ``P' f - 1``, which is small for a
confident token, is not made from it. The label's column of P' is zero, and its coefficient is a float32 number of its
own: minus the softmax of all *other* rows, which is a sum of what is positive::

    softmax[label] - 1 = -(Σ_rows≠label exp(Y - m)) / sum

Only the label's shard needs it. It keeps its own sum without the label's row, and takes the other shards' whole sums
from the statistics that are exchanged anyway.

**The extensions of** :class:`~.loss.Loss` keep that. With raw logits ``U = X Wᵀ``, ``Y = c tanh(U / c)``, the slope
``∂ = dY/dU = 1 - (Y/c)²``, the smoothed target ``G' = (1-ε) G + ε/V`` and ``lse = log sum + m``::

    loss = lse (1 + λ lse) - Σ G' Y      dY = (1 + 2λ lse) softmax - G'      dU = dY ∘ ∂

* z-loss is a factor a row, ``1 + 2λ lse``, known after the one barrier: it joins the factor that rescales P', which
  has the token's weight in it too.
* The soft cap is a factor an element, known before it: S stores ``P' ∘ ∂`` for P', and ``A = (P' ∘ ∂) W_k``.
* Smoothing subtracts ``ε/V ∘ ∂`` from every row. ``Σ G' Y`` adds up over shards where ``Y[label]`` did. The uniform
  part's product with W is ``Σ_rows ∂ W``: without a cap one vector for all tokens and microbatches, with a cap one more
  product in S (and ∂ is stored for T, which then makes the whole matrix). P' f and ε/V may be close on every row; so S
  stores ``P' - b``, with b the mean of P' over the other rows (weighted by ∂², which leaves least to be rounded), and
  ``b f (1 + 2λ lse) - ε/V`` is made in float32.

So each algorithm has the barriers it had. Rows of the padding have ``Y = -inf`` and ``∂ = 0``. In which form ∇X is
summed over shards is in :mod:`.sums`.

Shapes, per device: N tokens, D model width, R rows of the local shard, K shards. ``weight [N]`` is the loss mask over
the global count of valid tokens, so that gradients come out normalised.
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


class Kept(NamedTuple):
    """What S leaves for the gradient beside the statistics: a matrix, and vectors ``[N]`` in float32."""

    p: jax.Array
    """``(P' - b) ∘ ∂ [N, R]`` in the compute dtype, 0 at the label and in the padding."""
    rest: jax.Array
    """``Σ P'`` over the local rows without the label's."""
    base: jax.Array | None
    """b, None without smoothing."""
    label_slope: jax.Array | None
    """∂ at the label where it is here, None without a cap."""
    slopes: jax.Array | None
    """∂ at every row ``[N, R]`` in the compute dtype, None without cap and smoothing together."""


class Coefficients(NamedTuple):
    """The gradient of the raw logits, ``dU = p · scale + one_hot · label + ∂ · rows``: float32 vectors ``[N]``."""

    scale: jax.Array
    label: jax.Array
    """0 where the label is another shard's."""
    rows: jax.Array | None
    """None without smoothing."""


class Target(NamedTuple):
    """What the tokens are to be and how much they count: ``weight`` and ``labels`` are ``[N]``."""

    weight: jax.Array
    labels: jax.Array
    shard: Shard
    loss: Loss = PLAIN


def _local_label(labels: jax.Array, shard: Shard) -> jax.Array:
    # Labels of padding rows, which a masked token may have, hit nothing: 0 times their -inf would be NaN.
    return jnp.where(labels < shard.vocab_size, labels - shard.first_row, -1)


def _one_hot_mask(labels: jax.Array, shard: Shard, rows: int) -> jax.Array:
    return _local_label(labels, shard)[:, None] == lax.broadcasted_iota(jnp.int32, (1, rows), 1)


def _exists(shard: Shard, rows: int) -> jax.Array:
    """``[1, R]``: which rows are not padding."""
    return shard.first_row + lax.broadcasted_iota(jnp.int32, (1, rows), 1) < shard.vocab_size


def logits(w: jax.Array, x: jax.Array, shard: Shard, loss: Loss = PLAIN) -> jax.Array:
    """``Y [N, R]`` in float32; rows of the padding are -inf, so that any V gives the unpadded loss."""
    y = lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=F32)
    if loss.soft_cap is not None:
        y = loss.soft_cap * jnp.tanh(y / loss.soft_cap)
    return jnp.where(_exists(shard, w.shape[0]), y, -jnp.inf)


def exponentials(
    y: jax.Array,
    labels: jax.Array,
    shard: Shard,
    dtype: jnp.dtype,
    loss: Loss = PLAIN,
    maximum: jax.Array | None = None,
) -> tuple[Kept, Stats]:
    """S: what the gradient needs, its matrices in ``dtype``, and the local statistics.

    ``maximum`` is m where it is known already, else this shard's own is used. A shard of padding alone has p = 0 and
    sum' = 0.
    """
    if maximum is None:
        maximum = jnp.max(y, axis=1)
    e = jnp.exp(y - jnp.where(jnp.isfinite(maximum), maximum, 0)[:, None])
    label = _one_hot_mask(labels, shard, y.shape[1])
    others = jnp.where(label, 0, e)
    rest, at_label = jnp.sum(others, axis=1), jnp.sum(jnp.where(label, e, 0), axis=1)
    slope = None if loss.soft_cap is None else jnp.where(y > -jnp.inf, 1 - jnp.square(y / loss.soft_cap), 0)
    counted, base, slopes = others, None, None
    if loss.label_smoothing:
        each = jnp.where(label | ~_exists(shard, y.shape[1]), 0, 1 if slope is None else jnp.square(slope))
        base = jnp.sum(each * others, axis=1) / jnp.maximum(jnp.sum(each, axis=1), jnp.finfo(F32).tiny)
        counted = jnp.where(each > 0, others - base[:, None], 0)
        slopes = None if slope is None else slope.astype(dtype)
    kept = Kept(
        (counted if slope is None else counted * slope).astype(dtype),
        rest,
        base,
        None if slope is None else jnp.sum(jnp.where(label, slope, 0), axis=1),
        slopes,
    )
    return kept, Stats(maximum, rest + at_label, _target_logits(y, label, shard, loss))


def _target_logits(y: jax.Array, label: jax.Array, shard: Shard, loss: Loss) -> jax.Array:
    """``Σ G' Y [N]`` over the local rows: without smoothing ``Y[label]`` where the label is here, 0 elsewhere."""
    at_label = jnp.sum(jnp.where(label, y, 0), axis=1)
    if not loss.label_smoothing:
        return at_label
    uniform = jnp.sum(jnp.where(y > -jnp.inf, y, 0), axis=1) / shard.vocab_size
    return (1 - loss.label_smoothing) * at_label + loss.label_smoothing * uniform


def combine(of_shards: Stats) -> Stats:
    """The global statistics from those of all shards, stacked ``[K, N]``."""
    maximum = jnp.max(of_shards.maximum, axis=0)
    total = jnp.sum(of_shards.sum * jnp.exp(of_shards.maximum - maximum), axis=0)
    return Stats(maximum, total, jnp.sum(of_shards.target, axis=0))


def losses(whole: Stats, loss: Loss = PLAIN) -> jax.Array:
    """The loss of every token ``[N]``."""
    lse = _lse(whole)
    return lse - whole.target + (loss.z_loss * lse**2 if loss.z_loss else 0)


def _lse(whole: Stats) -> jax.Array:
    return jnp.log(whole.sum) + whole.maximum


def coefficients(of_shards: Stats, k: jax.Array | int, kept: Kept, target: Target, rows: int) -> Coefficients:
    """What turns shard k's part into the weighted gradient, from the statistics of all shards ``[K, N]``."""
    weight, labels, shard, loss = target
    whole = combine(of_shards)
    without_label = of_shards._replace(sum=of_shards.sum.at[k].set(kept.rest))
    others = combine(without_label).sum / whole.sum  # 1 - softmax[label], on the label's shard
    scale = jnp.exp(of_shards.maximum[k] - whole.maximum) / whole.sum * weight
    label = (loss.label_smoothing - others) * weight
    if loss.z_loss:
        pull = 2 * loss.z_loss * _lse(whole)
        scale *= 1 + pull
        label += pull * (1 - others) * weight
    uniform = None
    if loss.label_smoothing:
        base = kept.base * scale
        uniform = base - loss.label_smoothing / shard.vocab_size * weight
        label -= base  # the label's row has its part of what is added to all rows, of which only ε/V is its own
    if kept.label_slope is not None:
        label *= kept.label_slope
    local = _local_label(labels, shard)
    return Coefficients(scale, jnp.where((local >= 0) & (local < rows), label, 0), uniform)


def weight_gradient(accumulated: jax.Array, kept: Kept, x: jax.Array, at: Coefficients, target: Target) -> jax.Array:
    """T: ``accumulated + dUᵀ X [R, D]`` in float32."""
    matrix, scale = _scaled(kept, at)
    weighted = (x.astype(F32) * scale[:, None]).astype(x.dtype)
    product = lax.dot_general(matrix.astype(x.dtype), weighted, (((0,), (0,)), ((), ())), preferred_element_type=F32)
    total = accumulated + product
    if at.rows is not None and kept.slopes is None:
        uniform = jnp.sum(at.rows[:, None] * x.astype(F32), axis=0)
        total += jnp.where(_exists(target.shard, len(total)).T, uniform, 0)
    return scatter(total, target.labels, target.shard.first_row, at.label[:, None] * x.astype(F32))


def input_gradient(
    kept: Kept, w: jax.Array, at: Coefficients, target: Target, uniform: jax.Array | None = None
) -> jax.Array:
    """T of Algorithm 1: this shard's part of ∇X ``[N, D]`` in float32, to be summed over shards.

    ``uniform`` is :func:`uniform_input_gradient` where labels are smoothed and no cap is.
    """
    matrix, scale = _scaled(kept, at)
    return _with_label(_times(matrix.astype(w.dtype), w) * scale[:, None], w, at, target, uniform)


def _scaled(kept: Kept, at: Coefficients) -> tuple[jax.Array, jax.Array]:
    """``dU`` without its labels and, where no cap is, its uniform part: a matrix, and a factor for each row."""
    if kept.slopes is None:
        return kept.p, at.scale
    matrix = kept.p * at.scale[:, None] + at.rows[:, None] * kept.slopes
    return matrix.astype(kept.slopes.dtype), jnp.ones_like(at.scale)


def unscaled_input_gradient(kept: Kept, w: jax.Array) -> jax.Array:
    """S of Algorithm 2: ``A = p W_k [N, D]`` in float32, before the global sums are known."""
    return _times(kept.p, w)


def _times(p: jax.Array, w: jax.Array) -> jax.Array:
    return lax.dot_general(p, w, (((1,), (0,)), ((), ())), preferred_element_type=F32)


def uniform_input_gradient(w: jax.Array, shard: Shard, slopes: jax.Array | None = None) -> jax.Array:
    """``Σ_rows ∂ W_k``, which smoothing needs: ``[N, D]`` in float32, or ``[1, D]`` without a cap."""
    rows = _exists(shard, w.shape[0]) if slopes is None else slopes
    return _times(rows.astype(w.dtype), w)


def partial_input_gradient(
    a: jax.Array, w: jax.Array, at: Coefficients, target: Target, uniform: jax.Array | None = None
) -> jax.Array:
    """C1 of Algorithm 2: this shard's part of ∇X ``[N, D]`` in float32 from A, to be summed over shards.

    ``uniform`` is :func:`uniform_input_gradient` where labels are smoothed.
    """
    return _with_label(a * at.scale[:, None], w, at, target, uniform)


def _with_label(a: jax.Array, w: jax.Array, at: Coefficients, target: Target, uniform: jax.Array | None) -> jax.Array:
    """``a`` and what of ∇X is not in it: the labels' part, and smoothing's."""
    a = a + lookup(w, target.labels, target.shard.first_row) * at.label[:, None]
    if uniform is not None:
        a = a + uniform * at.rows[:, None]
    return a
