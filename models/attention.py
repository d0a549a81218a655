"""Attention inside documents: by cuDNN's flash kernel, or written out.

Shapes, all per device: B batch, L length (M, of keys), H heads, G heads of keys and values, R = H / G, K head width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from vocabpp_jax.model import Side
from vocabpp_jax.models.config import Config, attention_implementation

F32 = jnp.float32


def attend(config: Config, q: jax.Array, k: jax.Array, v: jax.Array, side: Side) -> jax.Array:
    """Causal attention inside documents: ``q [B, L, H, K]``, ``k`` and ``v [B, L, G, K]``, ``-> [B, L, H, K]``."""
    if attention_implementation(config) == "cudnn":
        mask = _same_document(side)
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")
    return written_out(q, k, v, reach(q.shape[1], side), scale=config.head_width**-0.5)


def reach(length: int, side: Side, window: jax.Array | int | None = None) -> jax.Array:
    """Which keys a query sees, ``[B or 1, 1, L, M]``: the last ``window`` of its document, itself included."""
    back = jnp.arange(length)[:, None] - jnp.arange(length)
    seen = (back >= 0)[None, None]
    if window is not None:
        seen &= back < window
    documents = _same_document(side)
    return seen if documents is None else seen & documents


def _same_document(side: Side) -> jax.Array | None:
    """``[B, 1, L, M]``, or None where a row is one document."""
    if "segment_ids" not in side:
        return None
    ids_BL = side["segment_ids"]
    return ids_BL[:, None, :, None] == ids_BL[:, None, None, :]


def written_out(
    q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, *, scale: float, cap: float | None = None
) -> jax.Array:
    """``softmax(scale · q kᵀ) v`` over what is seen; with ``cap`` the scores are squashed into plus and minus it."""
    B, L, H, K = q.shape
    weights = _weights(q.reshape(B, L, k.shape[2], -1, K), k, seen[:, :, None], scale, cap)
    return jnp.einsum("BGRLM,BMGK->BLGRK", weights, v).reshape(B, L, H, K)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _weights(q: jax.Array, k: jax.Array, seen: jax.Array, scale: float, cap: float | None) -> jax.Array:
    """The softmax, ``[B, G, R, L, M]``, computed in float32.

    It keeps no matrix of scores beside its result, which the product with v keeps too; autodiff would keep three and
    the mask.
    """
    return _weights_forward(q, k, seen, scale, cap)[0]


def _weights_forward(q: jax.Array, k: jax.Array, seen: jax.Array, scale: float, cap: float | None) -> tuple:
    scores = scale * jnp.einsum("BLGRK,BMGK->BGRLM", q, k, preferred_element_type=F32)
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    scores = jnp.where(seen, scores, -jnp.inf)
    maximum = jnp.max(scores, -1, keepdims=True)
    e = jnp.exp(scores - maximum)
    total = jnp.sum(e, -1, keepdims=True)
    weights = (e / total).astype(q.dtype)
    return weights, (q, k, weights, None if cap is None else jnp.log(total) + maximum)


def _weights_backward(scale: float, cap: float | None, kept: tuple, g: jax.Array) -> tuple:
    q, k, weights, lse = kept
    wide = weights.astype(F32)
    weighted = wide * g.astype(F32)
    d = scale * (weighted - wide * jnp.sum(weighted, -1, keepdims=True))
    if cap is not None:  # log weights + lse are the capped scores
        d = jnp.where(wide > 0, d * (1 - jnp.square((jnp.log(wide) + lse) / cap)), 0)
    d = d.astype(q.dtype)
    return jnp.einsum("BGRLM,BMGK->BLGRK", d, k), jnp.einsum("BGRLM,BLGRK->BMGK", d, q), None


_weights.defvjp(_weights_forward, _weights_backward)
