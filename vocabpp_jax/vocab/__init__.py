"""The vocabulary layers, sharded by rows over a mesh axis: pure functions over one device's arrays."""

from .input_layer import lookup, scatter
from .output_layer import (
    Shard,
    Stats,
    combine,
    factor,
    input_gradient,
    local_softmax,
    logit_gradient,
    logits,
    losses,
    partial_input_gradient,
    target_logits,
    unscaled_input_gradient,
    unsharded,
    unsharded_loss,
    weight_gradient,
)

__all__ = [
    "Shard",
    "Stats",
    "combine",
    "factor",
    "input_gradient",
    "local_softmax",
    "logit_gradient",
    "logits",
    "lookup",
    "losses",
    "partial_input_gradient",
    "scatter",
    "target_logits",
    "unscaled_input_gradient",
    "unsharded",
    "unsharded_loss",
    "weight_gradient",
]
