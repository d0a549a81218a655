"""Qwen: Llama's layer with biases on q, k and v (Qwen 2 and 2.5, arXiv 2412.15115) or per-head norms of q and k (Qwen
3, arXiv 2505.09388)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import jax
from flax import nnx

from vocabpp_jax.models.config import RotaryConfig
from vocabpp_jax.models.norms import RMSNorm
from vocabpp_jax.models.parts import Block, GatedMLP, RotaryAttention


@dataclass(frozen=True, kw_only=True)
class QwenConfig(RotaryConfig):
    """Configuration of a Qwen."""

    generation: int = 3
    """2 (which also covers 2.5) or 3."""
    rope_theta: float = 1_000_000.0
    norm_epsilon: float = 1e-6

    CHOICES: ClassVar[dict[str, tuple]] = RotaryConfig.CHOICES | {"generation": (2, 3)}

    def block(self, rngs: nnx.Rngs, axis: str | None = None) -> Block:
        norm = functools.partial(RMSNorm, epsilon=self.norm_epsilon)
        bias, head_norms = self.generation == 2, self.generation == 3
        attention = RotaryAttention(self, axis, rngs, norm=norm, bias=bias, head_norms=head_norms)
        return Block(self, attention, GatedMLP(self, axis, rngs, norm=norm, activation=jax.nn.silu))

    def norm(self, rngs: nnx.Rngs) -> RMSNorm:
        return RMSNorm(self.hidden, self.norm_epsilon)

    @property
    def kept_width(self) -> int:
        # Normalized heads are kept twice: as attention takes them, and as they came from the projection.
        normed = (self.heads + self.kv_heads) * self.head_size if self.generation == 3 else 0
        return super().kept_width + normed


_QWEN = dict(seq=8192, dtype="bfloat16")
_QWEN2 = _QWEN | dict(generation=2)
_QWEN3 = _QWEN | dict(generation=3, head_size=128, kv_heads=8, vocab_size=151_936)

SIZES = {
    "qwen-tiny": QwenConfig(layers=4, hidden=64, heads=4, kv_heads=2, head_size=16, inner=160, seq=64, vocab_size=256),
    "qwen2.5-0.5b": QwenConfig(
        **_QWEN2, tie_embeddings=True, layers=24, hidden=896, heads=14, kv_heads=2, head_size=64, inner=4864,
        vocab_size=151_936,
    ),
    "qwen2.5-7b": QwenConfig(
        **_QWEN2, layers=28, hidden=3584, heads=28, kv_heads=4, head_size=128, inner=18_944, vocab_size=152_064
    ),
    "qwen3-0.6b": QwenConfig(**_QWEN3, tie_embeddings=True, layers=28, hidden=1024, heads=16, inner=3072),
    "qwen3-8b": QwenConfig(**_QWEN3, layers=36, hidden=4096, heads=32, inner=12_288),
}  # fmt: skip
