"""Normalization over the last axis, computed in float32 for any input dtype, with a custom backward.

Shapes, all per device: D width of a row; leading axes are free.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from vocabpp_jax.pipeline.tensor import enter

F32 = jnp.float32


class RMSNorm(nnx.Module):
    """``x / rms(x) · (offset + scale)``; pass ``axis`` if each device along it uses ``scale [D]`` differently."""

    def __init__(self, width: int, epsilon: float, *, offset: float = 0.0):
        self.epsilon, self.offset = epsilon, offset
        self.scale = nnx.Param(jnp.full((width,), 1.0 - offset, jnp.float32))

    def __call__(self, x: jax.Array, axis: str | None = None) -> jax.Array:
        return _scaled(x, self.offset + enter(self.scale[...], axis).astype(F32), None, self.epsilon)


class LayerNorm(nnx.Module):
    """``(x - mean(x)) / std(x) · scale + bias``."""

    def __init__(self, width: int, epsilon: float):
        self.epsilon = epsilon
        self.scale, self.bias = nnx.Param(jnp.ones((width,), jnp.float32)), nnx.Param(jnp.zeros((width,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        return _scaled(x, self.scale[...], self.bias[...], self.epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _scaled(x: jax.Array, scale: jax.Array, bias: jax.Array | None, epsilon: float) -> jax.Array:
    """A norm, in the dtype of ``x``; with a bias, the mean is subtracted first.

    The backward starts from ``x`` again. Autodiff of the same lines would keep three arrays the size of ``x``, and
    takes two to three times as long on CPUs.
    """
    y = _normalized(x, epsilon, centred=bias is not None)[0] * scale.astype(F32)
    return (y if bias is None else y + bias.astype(F32)).astype(x.dtype)


def _normalized(x: jax.Array, epsilon: float, *, centred: bool) -> tuple[jax.Array, jax.Array]:
    """The rows scaled to mean square 1 in float32, and the factors, ``[..., 1]``."""
    wide = x.astype(F32)
    if centred:
        wide = wide - jnp.mean(wide, -1, keepdims=True)  # E[x²] - E[x]² would cancel
    factor = lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + epsilon)
    return wide * factor, factor


def _backward(epsilon: float, residual: tuple, g: jax.Array) -> tuple:
    x, scale, bias = residual
    rows, factor = _normalized(x, epsilon, centred=bias is not None)
    leading, wide = tuple(range(x.ndim - 1)), g.astype(F32)
    into = wide * scale.astype(F32)
    dx = into - rows * jnp.mean(into * rows, -1, keepdims=True)
    dbias = None
    if bias is not None:
        dx -= jnp.mean(into, -1, keepdims=True)
        dbias = jnp.sum(wide, leading).astype(bias.dtype)
    return (factor * dx).astype(x.dtype), jnp.sum(wide * rows, leading).astype(scale.dtype), dbias


_scaled.defvjp(
    lambda x, scale, bias, epsilon: (_scaled(x, scale, bias, epsilon), (x, scale, bias)),
    _backward,
)
