"""GPT-2, which is also the paper's GPT: LayerNorm, learned positions, a GELU, biases everywhere.

Shapes, all per device: B batch, L length, D model width, H heads, K head width (D = H K). Residuals are chosen as
:mod:`.parts` describes; here the MLP has no gate, and its pre-activation is kept.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
from flax import nnx

from vocabpp_jax.models.attention import attend
from vocabpp_jax.models.config import Config
from vocabpp_jax.models.norms import LayerNorm
from vocabpp_jax.models.parts import Block, linear, merged_heads_linear, recompute_if_selective, row_linear
from vocabpp_jax.pipeline.model_interface import AuxInputs
from vocabpp_jax.pipeline.tensor import enter

NORM_EPSILON = 1e-5


@dataclass(frozen=True, kw_only=True)
class GPTConfig(Config):
    """Configuration of a GPT."""

    mlp_ratio: int = 4
    """Width of the MLP in units of ``hidden``."""

    def block(self, rngs: nnx.Rngs, axis: str | None = None) -> Block:
        return Block(self, Attention(self, axis, rngs), MLP(self, axis, rngs))

    def norm(self, rngs: nnx.Rngs) -> LayerNorm:
        return LayerNorm(self.hidden, NORM_EPSILON)

    @property
    def positions(self) -> int:
        return self.seq

    @property
    def kept_width(self) -> int:
        # Input, q, k, v, attention output, post-attention stream, pre-activation.
        return (6 + self.mlp_ratio) * self.hidden


class Attention(nnx.Module):
    """The attention branch of a block: ``(x [B, L, D], aux_inputs) -> [B, L, D]``, with the norm, without the residual
    add.

    The columns of ``qkv`` are ordered by head, then q, k and v, so that any range of heads is a contiguous range of
    columns.
    """

    def __init__(self, config: GPTConfig, axis: str | None, rngs: nnx.Rngs):
        D = config.hidden
        self.config, self.axis = config, axis
        self.norm = config.norm(rngs)
        self.qkv = linear(D, 3 * D, config.init_std, rngs, bias=True)
        self.out = linear(D, D, config.out_std, rngs, bias=True)

    def __call__(self, x_BLD: jax.Array, aux_inputs: AuxInputs) -> jax.Array:
        project = functools.partial(_norm_qkv, self.config.head_width, self.axis)
        q, k, v = recompute_if_selective(self.config, project)(self.norm, self.qkv, x_BLD)
        a_BLHK = attend(self.config, q, k, v, aux_inputs)
        return recompute_if_selective(self.config, functools.partial(merged_heads_linear, self.axis))(self.out, a_BLHK)


def _norm_qkv(
    width: int, axis: str | None, norm: LayerNorm, qkv: nnx.Linear, x_BLD: jax.Array
) -> tuple[jax.Array, ...]:
    # Split in here, so that q, k and v are kept once, in the layout that attention takes.
    B, L, _ = x_BLD.shape
    qkv_BLH3K = qkv(enter(norm(x_BLD), axis)).reshape(B, L, -1, 3, width)
    return tuple(qkv_BLH3K[:, :, :, i] for i in range(3))


class MLP(nnx.Module):
    """The MLP branch of a block: ``x [B, L, D] -> [B, L, D]``, with the norm, without the residual add."""

    def __init__(self, config: GPTConfig, axis: str | None, rngs: nnx.Rngs):
        D, inner = config.hidden, config.mlp_ratio * config.hidden
        self.config, self.axis = config, axis
        self.norm = config.norm(rngs)
        self.up = linear(D, inner, config.init_std, rngs, bias=True)
        self.down = linear(inner, D, config.out_std, rngs, bias=True)

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        axis = self.axis

        def up(norm: LayerNorm, layer: nnx.Linear, x_BLD: jax.Array) -> jax.Array:
            return layer(enter(norm(x_BLD), axis))

        def down(layer: nnx.Linear, u: jax.Array) -> jax.Array:
            return row_linear(layer, nnx.gelu(u, approximate=True), axis)

        return recompute_if_selective(self.config, down)(
            self.down, recompute_if_selective(self.config, up)(self.norm, self.up, x_BLD)
        )


_PUBLISHED = {  # arXiv 2411.05288, tables 1 and 2; each was also run with seq 4096 and vocabularies up to 256000
    "4B": dict(layers=32, heads=24, hidden=3072),
    "10B": dict(layers=48, heads=32, hidden=4096),
    "21B": dict(layers=64, heads=40, hidden=5120),
    "7B": dict(layers=32, heads=32, hidden=4096),
    "16B": dict(layers=48, heads=40, hidden=5120),
    "30B": dict(layers=64, heads=48, hidden=6144),
}
_GPT2 = dict(seq=1024, vocab_size=50257, tie_embeddings=True)

SIZES = {
    "gpt-tiny": GPTConfig(layers=4, heads=4, hidden=64, seq=64, vocab_size=256),  # byte tokens; seconds on a laptop
    "gpt-micro": GPTConfig(layers=4, heads=4, hidden=128, seq=128, vocab_size=4096),  # minutes on two CPU cores
    "gpt-mini": GPTConfig(layers=8, heads=4, hidden=256, seq=256, vocab_size=8192),
    "gpt-small": GPTConfig(**_GPT2, layers=12, heads=12, hidden=768),  # GPT-2
    "gpt2-medium": GPTConfig(**_GPT2, layers=24, heads=16, hidden=1024),
    "gpt2-large": GPTConfig(**_GPT2, layers=36, heads=20, hidden=1280),
    "gpt2-xl": GPTConfig(**_GPT2, layers=48, heads=25, hidden=1600),
    **{name: GPTConfig(**dims, seq=2048, vocab_size=32_000, dtype="bfloat16") for name, dims in _PUBLISHED.items()},
}
"""The paper's models have its smallest sequence length and vocabulary."""
