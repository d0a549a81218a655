"""Models for the pipeline: a GPT in Flax NNX, its named sizes, and the single-device reference."""

from vocabpp_jax.models.gpt import GPT, GPTConfig, gpt
from vocabpp_jax.models.reference import reference_logits, reference_loss
from vocabpp_jax.models.sizes import (
    SIZES,
    embedding_flops,
    head_flops,
    layer_flops,
    layer_parameters,
    model_flops,
    named,
    parameters,
    vocabulary_parameters,
)

__all__ = [
    "GPT",
    "GPTConfig",
    "SIZES",
    "embedding_flops",
    "gpt",
    "head_flops",
    "layer_flops",
    "layer_parameters",
    "model_flops",
    "named",
    "parameters",
    "reference_logits",
    "reference_loss",
    "vocabulary_parameters",
]
