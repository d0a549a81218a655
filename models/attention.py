"""Causal attention within documents, by cuDNN's flash kernel or in plain XLA.

Shapes, all per device: B batch, L length (M, of keys), H heads, G heads of keys and values, R = H / G, K head width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from vocabpp_jax.models.config import Config, attention_implementation
from vocabpp_jax.models.document_attention import attend_in_documents
from vocabpp_jax.pipeline.model_interface import AuxInputs
from vocabpp_jax.pipeline.precision import exact_products

F32 = jnp.float32
_QUERIES, _MOST_BLOCKS = 128, 4  # fewest queries per block and most blocks of the plain XLA attention


def attend(config: Config, q: jax.Array, k: jax.Array, v: jax.Array, aux_inputs: AuxInputs) -> jax.Array:
    """Causal attention within documents: ``q [B, L, H, K]``, ``k`` and ``v [B, L, G, K]``, ``-> [B, L, H, K]``."""
    if attention_implementation(config) == "cudnn":
        if "segment_ids" in aux_inputs:
            return attend_in_documents(q, k, v, aux_inputs["segment_ids"], "cudnn")
        length = q.shape[1]
        if length % 2:  # cuDNN's kernels need an even length; no query sees the key appended at the end
            q, k, v = (jnp.pad(a, ((0, 0), (0, 1), (0, 0), (0, 0))) for a in (q, k, v))
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")[:, :length]
    return blocked_attention(q, k, v, attention_mask(q.shape[1], aux_inputs), scale=config.head_width**-0.5)


def attention_mask(length: int, aux_inputs: AuxInputs, window: jax.Array | int | None = None) -> jax.Array:
    """The keys that each query sees, ``[B or 1, 1, L, M]``: the last ``window`` of its document, itself included."""
    back = jnp.arange(length)[:, None] - jnp.arange(length)
    seen = (back >= 0)[None, None]
    if window is not None:
        seen &= back < window
    documents = _same_document(aux_inputs)
    return seen if documents is None else seen & documents


def _same_document(aux_inputs: AuxInputs) -> jax.Array | None:
    """``[B, 1, L, M]``, or None if every row is a single document."""
    if "segment_ids" not in aux_inputs:
        return None
    ids_BL = aux_inputs["segment_ids"]
    return ids_BL[:, None, :, None] == ids_BL[:, None, None, :]


def blocked_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, *, scale: float, cap: float | None = None
) -> jax.Array:
    """``softmax(scale · q kᵀ) v`` over the keys in ``seen``, which must be causal; ``cap`` is a soft cap on scores."""
    B, L, H, K = q.shape
    by_head = jnp.moveaxis(q.reshape(B, L, k.shape[2], -1, K), 1, 3)
    a_BGRLK = _attended(by_head, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), seen[:, :, None], scale, cap)
    return jnp.moveaxis(a_BGRLK, 3, 1).reshape(B, L, H, K)


def _blocks(length: int) -> list[slice]:
    """Blocks of queries. None sees a key after its last query, so four blocks save three eighths of the products."""
    count = max(1, min(_MOST_BLOCKS, length // _QUERIES))
    return [slice(length * n // count, length * (n + 1) // count) for n in range(count)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attended(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, scale: float, cap: float | None) -> jax.Array:
    """Attention of ``q [B, G, R, L, K]`` to ``k`` and ``v [B, G, M, K]``; the softmax is computed in float32.

    The residual is the softmax and no other score matrix; autodiff would keep four.
    """
    return _attended_forward(q, k, v, seen, scale, cap)[0]


def _attended_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, scale: float, cap: float | None
) -> tuple:
    made, kept = [], []
    with exact_products(q.dtype):  # derivative rules are traced outside the context of the function they belong to
        for block in _blocks(q.shape[3]):
            there = (slice(None), slice(None), slice(block.stop))
            scores = scale * jnp.einsum("BGRLK,BGMK->BGRLM", q[..., block, :], k[there], preferred_element_type=F32)
            if cap is not None:
                scores = cap * jnp.tanh(scores / cap)
            scores = jnp.where(seen[..., block, : block.stop], scores, -jnp.inf)
            maximum = jnp.max(scores, -1, keepdims=True)
            e = jnp.exp(scores - maximum)
            total = jnp.sum(e, -1, keepdims=True)
            weights = (e / total).astype(q.dtype)
            made.append(jnp.einsum("BGRLM,BGMK->BGRLK", weights, v[there]))
            kept.append((weights, None if cap is None else jnp.log(total) + maximum))
    return jnp.concatenate(made, axis=3), (q, k, v, tuple(kept))


def _attended_backward(scale: float, cap: float | None, residual: tuple, g: jax.Array) -> tuple:
    q, k, v, kept = residual
    product = functools.partial(jnp.einsum, preferred_element_type=F32)
    dq, dk, dv = [], jnp.zeros(k.shape, F32), jnp.zeros(v.shape, F32)
    with exact_products(q.dtype):
        for block, (weights, lse) in zip(_blocks(q.shape[3]), kept, strict=True):
            there, wide = (slice(None), slice(None), slice(block.stop)), weights.astype(F32)
            weighted = wide * product("BGRLK,BGMK->BGRLM", g[..., block, :], v[there])
            d = scale * (weighted - wide * jnp.sum(weighted, -1, keepdims=True))
            if cap is not None:  # log weights + lse are the capped scores
                d = jnp.where(wide > 0, d * (1 - jnp.square((jnp.log(wide) + lse) / cap)), 0)
            d = d.astype(q.dtype)
            dq.append(jnp.einsum("BGRLM,BGMK->BGRLK", d, k[there]))
            dk = dk.at[there].add(product("BGRLM,BGRLK->BGMK", d, q[..., block, :]))
            dv = dv.at[there].add(product("BGRLM,BGRLK->BGMK", weights, g[..., block, :]))
    return jnp.concatenate(dq, axis=3), dk.astype(k.dtype), dv.astype(v.dtype), None


_attended.defvjp(_attended_forward, _attended_backward)
