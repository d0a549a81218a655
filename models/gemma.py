"""Gemma 2 (arXiv 2408.00118).

Soft caps on attention scores and logits, sliding-window layers alternating with global ones, norms before and after
each branch, a gated GELU, and tied tables with a scaled embedding.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx

from vocabpp_jax.models import parts
from vocabpp_jax.models.attention import attention_mask, blocked_attention
from vocabpp_jax.models.config import RotaryConfig
from vocabpp_jax.models.norms import RMSNorm
from vocabpp_jax.models.parts import GatedMLP, RotaryAttention
from vocabpp_jax.pipeline.model_interface import AuxInputs
from vocabpp_jax.vocab import Loss


@dataclass(frozen=True, kw_only=True)
class GemmaConfig(RotaryConfig):
    """Configuration of a Gemma 2."""

    tie_embeddings: bool = True
    norm_epsilon: float = 1e-6
    query_scalar: int = 256
    """Scores are divided by its square root; not always the head width."""
    attention_cap: float | None = 50.0
    """Soft cap on attention scores: they are squashed to ± this value; None for no cap."""
    logit_cap: float | None = 30.0
    """Soft cap on the logits."""
    window: int | None = 4096
    """Tokens that a query of a sliding-window layer sees, itself included; None is all. These are layers 0, 2, ..."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention == "cudnn":
            raise ValueError("attention is 'cudnn'; its kernels have no soft cap, choose 'xla'")

    def block(self, rngs: nnx.Rngs, axis: str | None = None) -> Block:
        return Block(self, axis, rngs)

    def norm(self, rngs: nnx.Rngs) -> RMSNorm:
        return _norm(self)(self.hidden)

    @property
    def fits_cudnn(self) -> bool:
        return False  # cuDNN's kernels have no soft cap

    @property
    def embed_scale(self) -> float:
        return self.hidden**0.5

    @property
    def loss(self) -> Loss:
        return Loss(soft_cap=self.logit_cap)

    @property
    def layer_aux_inputs(self) -> tuple[AuxInputs, ...]:
        return tuple({"window": np.int32(self.span(layer))} for layer in range(self.layers))

    def span(self, layer: int) -> int:
        return self.seq if layer % 2 or self.window is None else min(self.window, self.seq)

    @property
    def kept_width(self) -> int:
        return super().kept_width + 2 * self.hidden  # inputs of the norms after the branches


def _norm(config: GemmaConfig) -> functools.partial:
    return functools.partial(RMSNorm, epsilon=config.norm_epsilon, offset=1.0)


def attend(config: GemmaConfig, q: jax.Array, k: jax.Array, v: jax.Array, aux_inputs: AuxInputs) -> jax.Array:
    """Causal attention with capped scores, limited to the last ``aux_inputs["window"]`` tokens."""
    seen = attention_mask(q.shape[1], aux_inputs, aux_inputs["window"])
    return blocked_attention(q, k, v, seen, scale=config.query_scalar**-0.5, cap=config.attention_cap)


class Block(parts.Block):
    """One layer, each branch normalized before and after. Attention sees the last ``aux_inputs["window"]`` tokens."""

    def __init__(self, config: GemmaConfig, axis: str | None, rngs: nnx.Rngs):
        norm = _norm(config)
        attention = RotaryAttention(config, axis, rngs, norm=norm, attend=attend)
        activation = functools.partial(jax.nn.gelu, approximate=True)
        super().__init__(config, attention, GatedMLP(config, axis, rngs, norm=norm, activation=activation))
        self.after_attention, self.after_mlp = norm(config.hidden), norm(config.hidden)

    def layer(self, x_BLD: jax.Array, aux_inputs: AuxInputs) -> jax.Array:
        after = parts.recompute_if_selective(self.config, lambda norm, branch_BLD: norm(branch_BLD))
        x_BLD = x_BLD + after(self.after_attention, self.attention(x_BLD, aux_inputs))
        return x_BLD + after(self.after_mlp, self.mlp(x_BLD))


_GEMMA = dict(seq=8192, vocab_size=256_000, dtype="bfloat16")

SIZES = {
    "gemma-tiny": GemmaConfig(
        layers=4, hidden=64, heads=4, kv_heads=2, head_size=16, inner=160, seq=64, vocab_size=256, window=16,
        query_scalar=16,
    ),
    "gemma2-2b": GemmaConfig(**_GEMMA, layers=26, hidden=2304, heads=8, kv_heads=4, head_size=256, inner=9216),
    "gemma2-9b": GemmaConfig(**_GEMMA, layers=42, hidden=3584, heads=16, kv_heads=8, head_size=256, inner=14_336),
    "gemma2-27b": GemmaConfig(
        **_GEMMA, layers=46, hidden=4608, heads=32, kv_heads=16, head_size=128, inner=36_864, query_scalar=144
    ),
}  # fmt: skip
