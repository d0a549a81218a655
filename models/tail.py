"""Multi-token prediction: what follows the last layer, for each further token (DeepSeek-V3, arXiv 2412.19437).

Depth k maps the previous depth's stream, and the embedding of the token k places ahead, to its own stream::

    h_k[i] = block_k(proj_k([norm(h_{k-1}[i]); norm(embedded[i + k])]))        h_0: the last layer's output

The model's final norm and head then predict token i + k + 1 from it. ``block_k`` is an ordinary layer.

Shapes: B batch, L length, D model width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from vocabpp_jax.models.config import Config, attention_implementation
from vocabpp_jax.models.parts import linear, recompute_if_selective, recomputed, row_linear
from vocabpp_jax.pipeline.model_interface import AuxInputs, Params
from vocabpp_jax.pipeline.tensor import enter


class Depth(nnx.Module):
    """One depth: ``(h [B, L, D], embedded [B, L, D], aux_inputs) -> h [B, L, D]``; embeddings are already shifted."""

    def __init__(self, config: Config, axis: str | None, rngs: nnx.Rngs):
        self.config, self.axis = config, axis
        self.stream_norm, self.token_norm = config.norm(rngs), config.norm(rngs)
        self.project = linear(2 * config.hidden, config.hidden, config.init_std, rngs)
        self.block = config.block(rngs, axis)

    def joined(self, h_BLD: jax.Array, embedded_BLD: jax.Array) -> jax.Array:
        """The block's input."""

        def project(norms: tuple, layer: nnx.Linear, h_BLD: jax.Array, embedded_BLD: jax.Array) -> jax.Array:
            both = jnp.concatenate([norms[0](h_BLD), norms[1](embedded_BLD)], axis=-1)
            both, rows = enter(both, self.axis), layer.kernel.shape[0]
            if self.axis is not None:
                both = lax.dynamic_slice_in_dim(both, lax.axis_index(self.axis) * rows, rows, axis=-1)
            return row_linear(layer, both, self.axis)

        norms = (self.stream_norm, self.token_norm)
        return recompute_if_selective(self.config, project)(norms, self.project, h_BLD, embedded_BLD)

    def depth(self, h_BLD: jax.Array, embedded_BLD: jax.Array, aux_inputs: AuxInputs) -> jax.Array:
        """The depth itself, regardless of recomputation."""
        return self.block(self.joined(h_BLD, embedded_BLD), aux_inputs)

    def __call__(self, h_BLD: jax.Array, embedded_BLD: jax.Array, aux_inputs: AuxInputs | None = None) -> jax.Array:
        depth = type(self).depth
        whole = recomputed(depth) if self.config.residuals == "full" else depth
        return whole(self, h_BLD, embedded_BLD, aux_inputs or {})


@dataclass(frozen=True)
class PureDepth:
    """:class:`Depth` as a pure function, ``(params, h, embedded, aux_inputs) -> h``; with ``axis``, a device's part."""

    config: Config
    axis: str | None = None
    _graphdef: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        make = functools.partial(Depth, self.config, self.axis)
        object.__setattr__(self, "_graphdef", nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0)))))

    def __call__(self, params: Params, h_BLD: jax.Array, embedded_BLD: jax.Array, aux_inputs: AuxInputs) -> jax.Array:
        return nnx.merge(self._graphdef, params)(h_BLD, embedded_BLD, aux_inputs)

    def on(self, platform: str) -> PureDepth:
        """The depth with the attention implementation for a platform."""
        return replace(self, config=replace(self.config, attention=attention_implementation(self.config, platform)))
