"""Named sizes of every architecture, and their parameter and FLOP counts, from their own matrices.

The formulas for FLOPs are in :mod:`vocabpp_jax.schedules.simulation.dimensions`.

Symbols: ``b`` microbatch size, ``s`` sequence length, ``h`` hidden size, ``V`` vocabulary, ``L`` layers. FLOPs are per
microbatch, forward and backward, without recomputation, with causal attention counted in full.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import jax
from flax import nnx

from vocabpp_jax.models import gemma, gpt, llama, qwen
from vocabpp_jax.models.config import Config
from vocabpp_jax.schedules.simulation.cost import Sizes
from vocabpp_jax.schedules.spelling import as_spelt

SIZES: dict[str, Config] = gpt.SIZES | llama.SIZES | qwen.SIZES | gemma.SIZES
"""Every named size."""


def named(name: str, **overrides: Any) -> Config:
    """The configuration of a named size, ignoring case, with some fields replaced.

    Raises:
        ValueError: an unknown name, a field that the architecture does not have, or an invalid value.
    """
    name = as_spelt(name, SIZES)
    if name not in SIZES:
        raise ValueError(f"size is {name!r}; it must be one of {', '.join(SIZES)}")
    for field in overrides:
        if not hasattr(SIZES[name], field):
            raise ValueError(f"{field} is given, which {name} does not have")
    return replace(SIZES[name], **overrides)


@cache
def _layer_shapes(config: Config) -> list[tuple[int, ...]]:
    """The shape of every parameter of one layer."""
    block = nnx.eval_shape(lambda: config.block(nnx.Rngs(0)))
    return [a.shape for a in jax.tree.leaves(nnx.to_pure_dict(nnx.state(block)))]


def _count(shapes: list[tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes))


def layer_parameters(config: Config) -> int:
    """Parameters of one layer."""
    return _count(_layer_shapes(config))


def layer_matrices(config: Config) -> int:
    """Parameters of one layer that are in matrices, which determine its FLOPs. GPT: 12h² at an MLP ratio of 4."""
    return _count([shape for shape in _layer_shapes(config) if len(shape) == 2])


def vocabulary_parameters(config: Config) -> int:
    """Parameters of one vocabulary table, hV. A model has two, or one if tied."""
    return config.vocab_size * config.hidden


def parameters(config: Config) -> int:
    """All parameters of the model."""
    norm = nnx.eval_shape(lambda: config.norm(nnx.Rngs(0)))
    ends = sum(a.size for a in jax.tree.leaves(nnx.state(norm))) + (config.positions or 0) * config.hidden
    tables = 1 if config.tie_embeddings else 2
    return config.layers * layer_parameters(config) + tables * vocabulary_parameters(config) + ends


def attended(config: Config) -> float:
    """Key elements that a token's query is multiplied with in a layer, averaged over layers. GPT: hs."""
    return config.heads * config.head_width * sum(map(config.span, range(config.layers))) / config.layers


def layer_flops(config: Config, batch: int = 1) -> float:
    """FLOPs of one layer, averaged over layers. GPT: bsh(72h + 12s) at an MLP ratio of 4."""
    return cost_sizes(config, batch).layer_flops


def head_flops(config: Config, batch: int = 1) -> int:
    """FLOPs of the LM head: 6bshV."""
    return cost_sizes(config, batch).head_flops


def embedding_flops(config: Config, batch: int = 1) -> int:
    """FLOPs of the embedding: 3bsh."""
    return cost_sizes(config, batch).embedding_flops


def model_flops(config: Config, batch: int = 1) -> float:
    """FLOPs of the model as counted for MFU: layers and head, without the embedding."""
    return cost_sizes(config, batch).iteration_flops(1)


def cost_sizes(config: Config, microbatch_size: int = 1, mtp_depth: int = 0) -> Sizes:
    """The dimensions for the cost model of :mod:`vocabpp_jax.schedules.simulation.cost`."""
    return Sizes(
        layers=config.layers,
        hidden=config.hidden,
        seq=config.seq,
        vocab_size=config.vocab_size,
        microbatch_size=microbatch_size,
        tied=config.tie_embeddings,
        matrices=layer_matrices(config),
        attended=attended(config),
        kept=config.kept_width,
        depths=mtp_depth,
    )
