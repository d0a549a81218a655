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
    q_BLGRK = q.reshape(B, L, k.shape[2], -1, K)
    scores = jnp.einsum("BLGRK,BMGK->BGRLM", q_BLGRK, k, preferred_element_type=F32)
    if cap is not None:
        scores, scale = cap * jnp.tanh(scores * (scale / cap)), 1.0
    weights = _softmax(scores, seen[:, :, None], scale, v.dtype)
    return jnp.einsum("BGRLM,BMGK->BLGRK", weights, v).reshape(B, L, H, K)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _softmax(scores: jax.Array, seen: jax.Array, scale: float, dtype: jnp.dtype) -> jax.Array:
    """Computed in float32. All that it keeps for the backward is its result, which the product with v keeps too;
    autodiff would keep three matrices of scores and the mask."""
    return jax.nn.softmax(jnp.where(seen, scale * scores, -jnp.inf)).astype(dtype)


def _softmax_forward(scores: jax.Array, seen: jax.Array, scale: float, dtype: jnp.dtype) -> tuple:
    p = _softmax(scores, seen, scale, dtype)
    return p, p


def _softmax_backward(scale: float, dtype: jnp.dtype, p: jax.Array, g: jax.Array) -> tuple:
    wide = p.astype(F32)
    weighted = wide * g.astype(F32)
    return scale * (weighted - wide * jnp.sum(weighted, -1, keepdims=True)), None


_softmax.defvjp(_softmax_forward, _softmax_backward)
