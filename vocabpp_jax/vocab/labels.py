"""Ignored labels, labels of further tokens, and checks for ids outside the vocabulary."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

IGNORED_LABEL = -100
"""A label that is never counted, whatever the loss mask says; same value as in PyTorch and Hugging Face."""


def counted(tokens: jax.Array, labels: jax.Array, mask: jax.Array, vocab_size: int) -> tuple[jax.Array, jax.Array]:
    """Labels and loss mask with :data:`IGNORED_LABEL` masked out; all of shape ``[m, B, L]``.

    The mask is NaN where a token id or a counted label is outside the vocabulary. The loss and gradients of the whole
    batch are then NaN, and training skips it. Costs nothing and works under ``jax.jit``.
    """
    ignored = labels == IGNORED_LABEL
    labels, mask = jnp.where(ignored, 0, labels), jnp.where(ignored, 0, mask)
    bad = _outside(tokens, vocab_size) | ((mask != 0) & _outside(labels, vocab_size))
    return labels, jnp.where(bad, jnp.nan, mask)


def ahead(
    labels: jax.Array, mask: jax.Array, depths: int, documents: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Labels and loss mask ``[m, 1 + depths, B, L]`` for the next token and ``depths`` further ones, from those of the
    next token ``[m, B, L]``: at depth k, position i gets those of i + k if that is in the same row and, given
    ``documents [m, B, L]``, in the same document."""
    L, found = labels.shape[-1], []
    for k in range(1 + depths):
        shifted = [jnp.pad(a[..., k:], ((0, 0), (0, 0), (0, k))) for a in (labels, mask)]
        if documents is not None and k:
            same = documents[..., k:] == documents[..., : L - k]
            shifted[1] = jnp.where(jnp.pad(same, ((0, 0), (0, 0), (0, k))), shifted[1], 0)
        found.append(shifted)
    labels, mask = (jnp.stack(arrays, axis=1) for arrays in zip(*found, strict=True))
    return labels, mask


def refuse_outside(tokens: object, labels: object, mask: object, vocab_size: int) -> None:
    """Raises ValueError for ids that :func:`counted` would turn into NaN, if values can be read: outside ``jax.jit``,
    and not for arrays on other hosts' devices."""
    arrays = (tokens, labels, mask)
    if any(isinstance(a, jax.core.Tracer) or (isinstance(a, jax.Array) and not a.is_fully_addressable) for a in arrays):
        return
    tokens, labels, mask = map(np.asarray, arrays)
    for name, ids, matters in (("tokens", tokens, True), ("labels", labels, (mask != 0) & (labels != IGNORED_LABEL))):
        bad = ids[_outside(ids, vocab_size) & matters]
        if bad.size:
            also = f", or {IGNORED_LABEL} for a label that does not count" if name == "labels" else ""
            raise ValueError(f"{name} has the id {bad[0]}; ids are 0 to {vocab_size - 1}{also}")


def _outside(ids: jax.Array | np.ndarray, vocab_size: int) -> jax.Array | np.ndarray:
    return (ids < 0) | (ids >= vocab_size)
