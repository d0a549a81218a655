"""Named GPT sizes, and what a size costs in parameters and FLOPs.

Symbols: ``b`` microbatch size, ``s`` sequence length, ``h`` hidden size, ``V`` vocabulary, ``L`` layers, ``r`` MLP
ratio. FLOPs are of one microbatch, forward and backward, nothing recomputed, attention counted in full though causal.
"""

from __future__ import annotations

from dataclasses import replace

from vocabpp_jax.models.gpt import GPTConfig

_PUBLISHED = {  # arXiv 2411.05288, tables 1 and 2; each was also run with seq 4096 and vocabularies up to 256000
    "4B": dict(layers=32, heads=24, hidden=3072),
    "10B": dict(layers=48, heads=32, hidden=4096),
    "21B": dict(layers=64, heads=40, hidden=5120),
    "7B": dict(layers=32, heads=32, hidden=4096),
    "16B": dict(layers=48, heads=40, hidden=5120),
    "30B": dict(layers=64, heads=48, hidden=6144),
}

SIZES: dict[str, GPTConfig] = {
    "gpt-tiny": GPTConfig(layers=4, heads=4, hidden=64, seq=64, vocab_size=256),  # bytes, seconds on a laptop
    "gpt-micro": GPTConfig(layers=4, heads=4, hidden=128, seq=128, vocab_size=4096),  # minutes on two CPU cores
    "gpt-mini": GPTConfig(layers=8, heads=4, hidden=256, seq=256, vocab_size=8192),
    "gpt-small": GPTConfig(layers=12, heads=12, hidden=768, seq=1024, vocab_size=50257, tie_embeddings=True),  # GPT-2
    **{name: GPTConfig(**dims, seq=2048, vocab_size=32_000, dtype="bfloat16") for name, dims in _PUBLISHED.items()},
}
"""Every named size. The published ones have the smallest published sequence length and vocabulary."""


def named(name: str, **overrides) -> GPTConfig:
    """The configuration of a named size with some fields replaced; an unknown name raises ValueError."""
    if name not in SIZES:
        raise ValueError(f"size is {name!r}; it must be one of {', '.join(SIZES)}")
    return replace(SIZES[name], **overrides)


def layer_parameters(config: GPTConfig) -> int:
    """Parameters of one layer: the matrices, 12h² at an MLP ratio of 4, their biases and two norms."""
    h, r = config.hidden, config.mlp_ratio
    return (4 + 2 * r) * h * h + (4 + r + 1) * h + 4 * h


def vocabulary_parameters(config: GPTConfig) -> int:
    """Parameters of one vocabulary table, hV. A model has two, or one where they are tied."""
    return config.vocab_size * config.hidden


def parameters(config: GPTConfig) -> int:
    """All parameters of the model."""
    tables = 1 if config.tie_embeddings else 2
    ends = tables * vocabulary_parameters(config) + config.seq * config.hidden + 2 * config.hidden
    return config.layers * layer_parameters(config) + ends


def layer_flops(config: GPTConfig, batch: int = 1) -> int:
    """FLOPs of one layer: bsh(72h + 12s) at an MLP ratio of 4."""
    s, h, r = config.seq, config.hidden, config.mlp_ratio
    return batch * s * h * (6 * (4 + 2 * r) * h + 12 * s)


def head_flops(config: GPTConfig, batch: int = 1) -> int:
    """FLOPs of the LM head: 6bshV."""
    return 6 * batch * config.seq * config.hidden * config.vocab_size


def embedding_flops(config: GPTConfig, batch: int = 1) -> int:
    """FLOPs of the embedding: 3bsh."""
    return 3 * batch * config.seq * config.hidden


def model_flops(config: GPTConfig, batch: int = 1) -> int:
    """FLOPs of the model as MFU counts them: L bsh(72h + 12s) + 6bshV, the embedding left out."""
    return config.layers * layer_flops(config, batch) + head_flops(config, batch)
