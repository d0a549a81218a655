"""The output layer and its loss, sharded by vocabulary rows (Sections 4.1 to 4.4).

On shard k, with ``Y = X W_kᵀ`` and one-hot labels ``G``, local quantities are primed::

    m' = max Y      P' = exp(Y - m')          sum' = Σ P'
    m  = max m'     sum  = Σ sum' e^(m' - m)  softmax = P' · f,  f = e^(m' - m) / sum
    loss = log sum + m - Y[label]     ∇X = Σ_k (softmax - G) W_k     ∇W_k = (softmax - G)ᵀ X

Once the global m and sum are known, shards differ only in f, one factor per token. That is what lets the barriers move:
Algorithm 1 exchanges m' and sum' before the matrix products of the backward; Algorithm 2 computes ``P' W_k`` before the
exchange and rescales its rows after. (The paper divides P' by sum' and moves sum' into f.) For the same reason the
matrix ``softmax - G`` is never materialised: its products are those of P', with f applied to the rows of the other
factor or of the result, plus one row of W, or of X, for each token. Maxima, sums, factors and losses are float32.

**No catastrophic cancellation.** P' is rounded to the compute dtype, so the label's entry ``P' f - 1``, which is small
for a confident token, is not computed from it. The label's column of P' is zero, and its coefficient is a separate
float32 number: minus the softmax of all *other* rows, a sum of positive terms::

    softmax[label] - 1 = -(Σ_rows≠label exp(Y - m)) / sum

Only the label's shard needs it. That shard keeps its own sum without the label's row, and gets the other shards' sums
from the statistics, which are exchanged anyway.

**The extensions of** :class:`~.loss.Loss` preserve this. With raw logits ``U = X Wᵀ``, ``Y = c tanh(U / c)``, the slope
``∂ = dY/dU = 1 - (Y/c)²``, the smoothed target ``G' = (1-ε) G + ε/V`` and ``lse = log sum + m``::

    loss = lse (1 + λ lse) - Σ G' Y      dY = (1 + 2λ lse) softmax - G'      dU = dY ∘ ∂

* z-loss is a factor per token, ``1 + 2λ lse``, known after the one barrier. It is folded into the factor that rescales
  P', as is the token's weight.
* The soft cap is a factor per element, known before the barrier: S stores ``P' ∘ ∂`` instead of P', and
  ``A = (P' ∘ ∂) W_k``.
* Smoothing subtracts ``ε/V ∘ ∂`` from every row. ``Σ G' Y`` is summed over shards in place of ``Y[label]``. The uniform
  part's product with W is ``Σ_rows ∂ W``: without a cap, one vector for all tokens and microbatches; with a cap, one
  more product in S (and ∂ is stored for T, which then forms the full matrix). P' f and ε/V may be close on every row,
  so S stores ``P' - b``, where b is the mean of P' over the other rows (weighted by ∂², which minimises what is
  rounded), and ``b f (1 + 2λ lse) - ε/V`` is computed in float32.

Neither algorithm gains a barrier. Padding rows have ``Y = -inf`` and ``∂ = 0``. :mod:`.sums` describes how ∇X is summed
over shards.

Shapes, per device: N tokens, D model width, R rows of the local shard, K shards. ``weight_N`` is the loss mask divided
by the global count of valid tokens, so gradients come out normalised.
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
    """The vocabulary rows on a device: those from ``first_row`` on, of a vocabulary of ``vocab_size``."""

    first_row: jax.Array | int
    vocab_size: int


class Stats(NamedTuple):
    """Softmax statistics in float32: ``[N]`` of one shard or of all combined, ``[K, N]`` where shards are stacked."""

    maximum: jax.Array
    sum: jax.Array
    """``Σ exp(Y - maximum)``."""
    target: jax.Array
    """``Σ G' Y``."""


class Kept(NamedTuple):
    """What S stores for the backward besides the statistics: a matrix, and float32 vectors."""

    p_NR: jax.Array
    """``(P' - b) ∘ ∂`` in the compute dtype, 0 at the label and in the padding."""
    rest_N: jax.Array
    """``Σ P'`` over the local rows without the label's."""
    base_N: jax.Array | None
    """b, None without smoothing."""
    label_slope_N: jax.Array | None
    """∂ at the label if it is in this shard, None without a cap."""
    slopes_NR: jax.Array | None
    """∂ at every row in the compute dtype, None unless there are both a cap and smoothing."""


class Coefficients(NamedTuple):
    """The gradient of the raw logits, ``dU = p · scale + one_hot · label + ∂ · rows``, as float32 vectors."""

    scale_N: jax.Array
    label_N: jax.Array
    """0 where the label is in another shard."""
    rows_N: jax.Array | None
    """None without smoothing."""


class Target(NamedTuple):
    """The labels of the tokens, their weights in the loss, and the loss."""

    weight_N: jax.Array
    labels_N: jax.Array
    shard: Shard
    loss: Loss = PLAIN


def _local_label(labels_N: jax.Array, shard: Shard) -> jax.Array:
    # A masked token's label may point at a padding row. It must select nothing: 0 times that row's -inf would be NaN.
    return jnp.where(labels_N < shard.vocab_size, labels_N - shard.first_row, -1)


def _one_hot_mask(labels_N: jax.Array, shard: Shard, rows: int) -> jax.Array:
    return _local_label(labels_N, shard)[:, None] == lax.broadcasted_iota(jnp.int32, (1, rows), 1)


def _in_vocabulary(shard: Shard, rows: int) -> jax.Array:
    """``[1, R]``: False for padding rows."""
    return shard.first_row + lax.broadcasted_iota(jnp.int32, (1, rows), 1) < shard.vocab_size


def logits(w_RD: jax.Array, x_ND: jax.Array, shard: Shard, loss: Loss = PLAIN) -> jax.Array:
    """``Y [N, R]`` in float32. Padding rows are -inf, so padding V does not change the loss."""
    y_NR = lax.dot_general(x_ND, w_RD, (((1,), (1,)), ((), ())), preferred_element_type=F32)
    if loss.soft_cap is not None:
        y_NR = loss.soft_cap * jnp.tanh(y_NR / loss.soft_cap)
    return jnp.where(_in_vocabulary(shard, w_RD.shape[0]), y_NR, -jnp.inf)


def exponentials(
    y_NR: jax.Array,
    labels_N: jax.Array,
    shard: Shard,
    dtype: jnp.dtype,
    loss: Loss = PLAIN,
    maximum_N: jax.Array | None = None,
) -> tuple[Kept, Stats]:
    """S: what the backward needs, its matrices in ``dtype``, and the local statistics.

    ``maximum_N`` is the global m if already known; otherwise the shard's own maximum is used. A shard of padding alone
    has p = 0 and sum' = 0.
    """
    if maximum_N is None:
        maximum_N = jnp.max(y_NR, axis=1)
    e_NR = jnp.exp(y_NR - jnp.where(jnp.isfinite(maximum_N), maximum_N, 0)[:, None])
    is_label_NR = _one_hot_mask(labels_N, shard, y_NR.shape[1])
    others_NR = jnp.where(is_label_NR, 0, e_NR)
    rest_N, at_label_N = jnp.sum(others_NR, axis=1), jnp.sum(jnp.where(is_label_NR, e_NR, 0), axis=1)
    slope_NR = None if loss.soft_cap is None else jnp.where(y_NR > -jnp.inf, 1 - jnp.square(y_NR / loss.soft_cap), 0)
    p_NR, base_N, slopes_NR = others_NR, None, None
    if loss.label_smoothing:
        excluded_NR = is_label_NR | ~_in_vocabulary(shard, y_NR.shape[1])
        share_NR = jnp.where(excluded_NR, 0, 1 if slope_NR is None else jnp.square(slope_NR))
        base_N = jnp.sum(share_NR * others_NR, axis=1) / jnp.maximum(jnp.sum(share_NR, axis=1), jnp.finfo(F32).tiny)
        p_NR = jnp.where(share_NR > 0, others_NR - base_N[:, None], 0)
        slopes_NR = None if slope_NR is None else slope_NR.astype(dtype)
    kept = Kept(
        (p_NR if slope_NR is None else p_NR * slope_NR).astype(dtype),
        rest_N,
        base_N,
        None if slope_NR is None else jnp.sum(jnp.where(is_label_NR, slope_NR, 0), axis=1),
        slopes_NR,
    )
    return kept, Stats(maximum_N, rest_N + at_label_N, _target_logits(y_NR, is_label_NR, shard, loss))


def _target_logits(y_NR: jax.Array, is_label_NR: jax.Array, shard: Shard, loss: Loss) -> jax.Array:
    """``Σ G' Y [N]`` over the local rows. Without smoothing, ``Y[label]`` if the label is in this shard, else 0."""
    at_label_N = jnp.sum(jnp.where(is_label_NR, y_NR, 0), axis=1)
    if not loss.label_smoothing:
        return at_label_N
    uniform_N = jnp.sum(jnp.where(y_NR > -jnp.inf, y_NR, 0), axis=1) / shard.vocab_size
    return (1 - loss.label_smoothing) * at_label_N + loss.label_smoothing * uniform_N


def combine(stats_KN: Stats) -> Stats:
    """The global statistics ``[N]`` from the stacked statistics ``[K, N]`` of all shards."""
    maximum_N = jnp.max(stats_KN.maximum, axis=0)
    sum_N = jnp.sum(stats_KN.sum * jnp.exp(stats_KN.maximum - maximum_N), axis=0)
    return Stats(maximum_N, sum_N, jnp.sum(stats_KN.target, axis=0))


def losses(stats_N: Stats, loss: Loss = PLAIN) -> jax.Array:
    """The loss of every token ``[N]``, from global statistics."""
    lse_N = _lse(stats_N)
    return lse_N - stats_N.target + (loss.z_loss * lse_N**2 if loss.z_loss else 0)


def _lse(stats_N: Stats) -> jax.Array:
    return jnp.log(stats_N.sum) + stats_N.maximum


def coefficients(stats_KN: Stats, k: jax.Array | int, kept: Kept, target: Target, rows: int) -> Coefficients:
    """The coefficients of shard k's weighted gradient, from the statistics ``[K, N]`` of all shards."""
    weight_N, labels_N, shard, loss = target
    stats_N = combine(stats_KN)
    without_label_KN = stats_KN._replace(sum=stats_KN.sum.at[k].set(kept.rest_N))
    others_N = combine(without_label_KN).sum / stats_N.sum  # 1 - softmax[label], on the label's shard
    scale_N = jnp.exp(stats_KN.maximum[k] - stats_N.maximum) / stats_N.sum * weight_N
    label_N = (loss.label_smoothing - others_N) * weight_N
    if loss.z_loss:
        pull_N = 2 * loss.z_loss * _lse(stats_N)
        scale_N *= 1 + pull_N
        label_N += pull_N * (1 - others_N) * weight_N
    rows_N = None
    if loss.label_smoothing:
        base_N = kept.base_N * scale_N
        rows_N = base_N - loss.label_smoothing / shard.vocab_size * weight_N
        label_N -= base_N  # rows_N is added to the label's row too, where only its ε/V belongs
    if kept.label_slope_N is not None:
        label_N *= kept.label_slope_N
    local_N = _local_label(labels_N, shard)
    return Coefficients(scale_N, jnp.where((local_N >= 0) & (local_N < rows), label_N, 0), rows_N)


def weight_gradient(
    accumulated_RD: jax.Array, kept: Kept, x_ND: jax.Array, coef: Coefficients, target: Target
) -> jax.Array:
    """T: ``accumulated + dUᵀ X [R, D]`` in float32."""
    dtype = x_ND.dtype
    matrix_NR, scale_N = _scaled(kept, coef)
    scaled_ND = (x_ND.astype(F32) * scale_N[:, None]).astype(dtype)
    product_RD = lax.dot_general(
        matrix_NR.astype(dtype), scaled_ND, (((0,), (0,)), ((), ())), preferred_element_type=F32
    )
    total_RD = accumulated_RD + product_RD
    if coef.rows_N is not None and kept.slopes_NR is None:
        uniform_D = jnp.sum(coef.rows_N[:, None] * x_ND.astype(F32), axis=0)
        total_RD += jnp.where(_in_vocabulary(target.shard, len(total_RD)).T, uniform_D, 0)
    return scatter(total_RD, target.labels_N, target.shard.first_row, coef.label_N[:, None] * x_ND.astype(F32))


def input_gradient(
    kept: Kept, w_RD: jax.Array, coef: Coefficients, target: Target, uniform: jax.Array | None = None
) -> jax.Array:
    """T of Algorithm 1: this shard's part of ∇X ``[N, D]`` in float32, to be summed over shards.

    ``uniform`` is :func:`uniform_input_gradient`, needed with smoothing and no cap.
    """
    matrix_NR, scale_N = _scaled(kept, coef)
    return _add_label(_times(matrix_NR.astype(w_RD.dtype), w_RD) * scale_N[:, None], w_RD, coef, target, uniform)


def _scaled(kept: Kept, coef: Coefficients) -> tuple[jax.Array, jax.Array]:
    """``dU`` as a matrix ``[N, R]`` and a factor ``[N]``, without the label part and, if uncapped, the uniform part."""
    if kept.slopes_NR is None:
        return kept.p_NR, coef.scale_N
    matrix_NR = kept.p_NR * coef.scale_N[:, None] + coef.rows_N[:, None] * kept.slopes_NR
    return matrix_NR.astype(kept.slopes_NR.dtype), jnp.ones_like(coef.scale_N)


def unscaled_input_gradient(kept: Kept, w_RD: jax.Array) -> jax.Array:
    """S of Algorithm 2: ``A = p W_k [N, D]`` in float32, before the global sums are known."""
    return _times(kept.p_NR, w_RD)


def _times(p_NR: jax.Array, w_RD: jax.Array) -> jax.Array:
    return lax.dot_general(p_NR, w_RD, (((1,), (0,)), ((), ())), preferred_element_type=F32)


def uniform_input_gradient(w_RD: jax.Array, shard: Shard, slopes_NR: jax.Array | None = None) -> jax.Array:
    """``Σ_rows ∂ W_k``, needed with smoothing: ``[N, D]`` in float32, or ``[1, D]`` without a cap."""
    slopes = _in_vocabulary(shard, w_RD.shape[0]) if slopes_NR is None else slopes_NR
    return _times(slopes.astype(w_RD.dtype), w_RD)


def partial_input_gradient(
    a_ND: jax.Array, w_RD: jax.Array, coef: Coefficients, target: Target, uniform: jax.Array | None = None
) -> jax.Array:
    """C1 of Algorithm 2: this shard's part of ∇X ``[N, D]`` in float32 from A, to be summed over shards.

    ``uniform`` is :func:`uniform_input_gradient`, needed with smoothing.
    """
    return _add_label(a_ND * coef.scale_N[:, None], w_RD, coef, target, uniform)


def _add_label(
    a_ND: jax.Array, w_RD: jax.Array, coef: Coefficients, target: Target, uniform: jax.Array | None
) -> jax.Array:
    """Adds the parts of ∇X that are not in ``a_ND``: the labels', and smoothing's."""
    a_ND = a_ND + lookup(w_RD, target.labels_N, target.shard.first_row) * coef.label_N[:, None]
    if uniform is not None:
        a_ND = a_ND + uniform * coef.rows_N[:, None]
    return a_ND
