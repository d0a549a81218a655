"""Flax modules that architectures share; each architecture's own file combines them.

Shapes, all per device: B batch, L length, D model width, H heads, G heads of keys and values, K head width.

A block is cut into small functions so that its residuals are a choice (``Config.residuals``). Under ``selective``, each
function holds the matrix products of a single input, so that the backward can be split into an input-gradient half and
a weight-gradient half without repeating any::

    q, k, v = norm + linear (x), rotated      kept: x, q, k, v         (the normed x is recomputed)
    a       = attention (q, k, v)             kept: a, and what the attention kernel keeps for itself
    x       = x + out linear (a)              kept: x
    g, u    = norm + linear (x)               kept: g, u               (the normed x is recomputed)
    x       = x + down linear (act(g) · u)                             (the activation is recomputed)

With ``axis``, a module computes one device's share of the heads and of the MLP's width. Shapes are read from the
weights, so one module serves both cases.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
from flax import nnx

from vocabpp_jax.models.attention import attend
from vocabpp_jax.models.config import Config, RotaryConfig
from vocabpp_jax.models.norms import RMSNorm
from vocabpp_jax.models.rotary import frequencies, rotated
from vocabpp_jax.pipeline.model_interface import AuxInputs
from vocabpp_jax.pipeline.tensor import enter, leave


def recomputed(function: Callable) -> Callable:
    """A function that keeps only its inputs for the backward."""
    # prevent_cse=False: forward and backward run as separate passes, so there is nothing for CSE to merge, and the
    # barriers that would prevent it also prevent fusion.
    return jax.checkpoint(function, prevent_cse=False)


def recompute_if_selective(config: Config, function: Callable) -> Callable:
    """Under ``selective``, recompute the function in the backward, except for its matrix product."""
    return recomputed(function) if config.residuals == "selective" else function


def linear(width_in: int, width_out: int, std: float, rngs: nnx.Rngs, *, bias: bool = False) -> nnx.Linear:
    """``x @ kernel [in, out]``, plus ``bias [out]``."""
    return nnx.Linear(width_in, width_out, use_bias=bias, kernel_init=nnx.initializers.normal(std), rngs=rngs)


def row_linear(layer: nnx.Linear, x: jax.Array, axis: str | None) -> jax.Array:
    """A linear layer whose rows are sharded over ``axis``: partial products are summed, the bias is added once."""
    y = leave(x @ layer.kernel[...], axis)
    return y if layer.bias is None else y + layer.bias[...]


def merged_heads_linear(axis: str | None, out: nnx.Linear, a_BLHK: jax.Array) -> jax.Array:
    """The output projection. The reshape is in here, or the attention output would be kept twice."""
    return row_linear(out, a_BLHK.reshape(*a_BLHK.shape[:2], -1), axis)


class RotaryAttention(nnx.Module):
    """The attention branch of a block: ``(x [B, L, D], aux_inputs) -> [B, L, D]``, with norm, without residual add."""

    def __init__(
        self,
        config: RotaryConfig,
        axis: str | None,
        rngs: nnx.Rngs,
        *,
        norm: Callable[[int], RMSNorm],
        attend: Callable[..., jax.Array] = attend,
        bias: bool = False,
        head_norms: bool = False,
    ):
        D, K = config.hidden, config.head_size
        self.config, self.axis, self.attend = config, axis, attend
        self.norm = norm(D)
        self.q = linear(D, config.heads * K, config.init_std, rngs, bias=bias)
        self.k = linear(D, config.kv_heads * K, config.init_std, rngs, bias=bias)
        self.v = linear(D, config.kv_heads * K, config.init_std, rngs, bias=bias)
        self.out = linear(config.heads * K, D, config.out_std, rngs)
        self.head_norms = head_norms
        if head_norms:
            self.q_norm, self.k_norm = norm(K), norm(K)

    def __call__(self, x_BLD: jax.Array, aux_inputs: AuxInputs) -> jax.Array:
        config = self.config
        rotate = functools.partial(rotated, frequencies=frequencies(config))
        project = functools.partial(_norm_qkv, config.head_size, self.axis, rotate=None if self.head_norms else rotate)
        q, k, v = recompute_if_selective(config, project)(self.norm, (self.q, self.k, self.v), x_BLD)
        if self.head_norms:
            # A separate function: recomputing it along with the projection would repeat two matrix products.
            normed = recompute_if_selective(config, lambda norm, x_BLHK: rotate(norm(x_BLHK, self.axis)))
            q, k = normed(self.q_norm, q), normed(self.k_norm, k)
        a_BLHK = self.attend(config, q, k, v, aux_inputs)
        return recompute_if_selective(config, functools.partial(merged_heads_linear, self.axis))(self.out, a_BLHK)


def _norm_qkv(
    width: int,
    axis: str | None,
    norm: RMSNorm,
    qkv: tuple[nnx.Linear, ...],
    x_BLD: jax.Array,
    *,
    rotate: Callable | None,
) -> tuple[jax.Array, ...]:
    normed = enter(norm(x_BLD), axis)
    q, k, v = (part(normed).reshape(*x_BLD.shape[:2], -1, width) for part in qkv)
    return (q, k, v) if rotate is None else (rotate(q), rotate(k), v)


class GatedMLP(nnx.Module):
    """The MLP branch of a block: ``x [B, L, D] -> [B, L, D]``, with the norm, without the residual add."""

    def __init__(self, config: RotaryConfig, axis: str | None, rngs: nnx.Rngs, *, norm: Callable, activation: Callable):
        self.config, self.axis, self.activation = config, axis, activation
        self.norm = norm(config.hidden)
        self.gate = linear(config.hidden, config.inner, config.init_std, rngs)
        self.up = linear(config.hidden, config.inner, config.init_std, rngs)
        self.down = linear(config.inner, config.hidden, config.out_std, rngs)

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        config, axis = self.config, self.axis

        def up(norm: RMSNorm, layers: tuple[nnx.Linear, ...], x_BLD: jax.Array) -> tuple[jax.Array, ...]:
            normed = enter(norm(x_BLD), axis)
            return tuple(layer(normed) for layer in layers)

        def down(layer: nnx.Linear, gate: jax.Array, up: jax.Array) -> jax.Array:
            return row_linear(layer, self.activation(gate) * up, axis)

        return recompute_if_selective(config, down)(
            self.down, *recompute_if_selective(config, up)(self.norm, (self.gate, self.up), x_BLD)
        )


class Block(nnx.Module):
    """One pre-norm layer: ``(x [B, L, D], aux_inputs) -> [B, L, D]``.

    ``aux_inputs["segment_ids"]`` ``[B, L]``, if present, numbers the documents packed into a row; attention stays
    within a document. No weight is cast here: parameters and ``x`` share one dtype, which is also the result's. A cast
    copy would be kept for the backward, once per layer and microbatch.
    """

    def __init__(self, config: Config, attention: nnx.Module, mlp: nnx.Module):
        self.config, self.attention, self.mlp = config, attention, mlp

    def layer(self, x_BLD: jax.Array, aux_inputs: AuxInputs) -> jax.Array:
        """The layer itself, regardless of recomputation."""
        x_BLD = x_BLD + self.attention(x_BLD, aux_inputs)
        return x_BLD + self.mlp(x_BLD)

    def __call__(self, x_BLD: jax.Array, aux_inputs: AuxInputs | None = None) -> jax.Array:
        layer = type(self).layer
        return (recomputed(layer) if self.config.residuals == "full" else layer)(self, x_BLD, aux_inputs or {})
