"""Flax NNX models for the pipeline, their named sizes and weights, and the single-device reference.

:mod:`.huggingface` is imported on first use: only it needs safetensors.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from vocabpp_jax.models.adapters import from_nnx, from_pytree
from vocabpp_jax.models.config import Config
from vocabpp_jax.models.decoder import Decoder, build
from vocabpp_jax.models.gemma import GemmaConfig
from vocabpp_jax.models.gpt import GPTConfig
from vocabpp_jax.models.llama import LlamaConfig
from vocabpp_jax.models.qwen import QwenConfig
from vocabpp_jax.models.reference import reference_logits, reference_loss, reference_sums
from vocabpp_jax.models.sizes import (
    SIZES,
    attended,
    cost_sizes,
    embedding_flops,
    head_flops,
    layer_flops,
    layer_matrices,
    layer_parameters,
    model_flops,
    named,
    parameters,
    vocabulary_parameters,
)

__all__ = [
    "Config",
    "Decoder",
    "GPTConfig",
    "GemmaConfig",
    "LlamaConfig",
    "QwenConfig",
    "SIZES",
    "attended",
    "build",
    "cost_sizes",
    "embedding_flops",
    "from_nnx",
    "from_pytree",
    "head_flops",
    "huggingface",
    "layer_flops",
    "layer_matrices",
    "layer_parameters",
    "model_flops",
    "named",
    "parameters",
    "reference_logits",
    "reference_loss",
    "reference_sums",
    "vocabulary_parameters",
]


def __getattr__(name: str) -> Any:
    if name == "huggingface":
        return import_module("vocabpp_jax.models.huggingface")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
