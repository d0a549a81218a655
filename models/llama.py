"""Llama 3: RMSNorm, rotary positions, grouped queries and a gated SiLU (arXiv 2407.21783)."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
from flax import nnx

from vocabpp_jax.models.config import RopeScaling, RotaryConfig
from vocabpp_jax.models.norms import RMSNorm
from vocabpp_jax.models.parts import Block, GatedMLP, RotaryAttention


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(RotaryConfig):
    """Configuration of a Llama."""

    rope_theta: float = 500_000.0

    def block(self, rngs: nnx.Rngs, axis: str | None = None) -> Block:
        norm = functools.partial(RMSNorm, epsilon=self.norm_epsilon)
        attention = RotaryAttention(self, axis, rngs, norm=norm)
        return Block(self, attention, GatedMLP(self, axis, rngs, norm=norm, activation=jax.nn.silu))

    def norm(self, rngs: nnx.Rngs) -> RMSNorm:
        return RMSNorm(self.hidden, self.norm_epsilon)


_LLAMA = dict(head_size=128, kv_heads=8, vocab_size=128_256, seq=8192, dtype="bfloat16")
_LONGER = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_seq=8192)
_LONGER_SMALL = RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_seq=8192)

SIZES = {
    "llama-tiny": LlamaConfig(
        layers=4, hidden=64, heads=4, kv_heads=2, head_size=16, inner=160, seq=64, vocab_size=256
    ),
    "llama-3.2-1b": LlamaConfig(
        **_LLAMA | dict(head_size=64, tie_embeddings=True, rope_scaling=_LONGER_SMALL),
        layers=16, hidden=2048, heads=32, inner=8192,
    ),
    "llama-3.2-3b": LlamaConfig(
        **_LLAMA | dict(tie_embeddings=True, rope_scaling=_LONGER_SMALL),
        layers=28, hidden=3072, heads=24, inner=8192,
    ),
    "llama-3-8b": LlamaConfig(**_LLAMA, layers=32, hidden=4096, heads=32, inner=14_336),
    "llama-3.1-8b": LlamaConfig(
        **_LLAMA, rope_scaling=_LONGER, layers=32, hidden=4096, heads=32, inner=14_336
    ),
    "llama-3-70b": LlamaConfig(**_LLAMA, layers=80, hidden=8192, heads=64, inner=28_672),
}  # fmt: skip
"""``seq`` is the length of the original training; set it for longer sequences."""
