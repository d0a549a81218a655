"""The vocabulary layers, sharded by rows over a mesh axis: pure functions over one device's arrays."""

from .input_layer import lookup, scatter
from .loss import Loss
from .output_layer import (
    Shard,
    Slopes,
    Stats,
    capped,
    combine,
    factor,
    input_gradient,
    local_softmax,
    logit_gradient,
    logits,
    losses,
    partial_input_gradient,
    slopes,
    target_logits,
    uniform_input_gradient,
    unscaled_input_gradient,
    weight_gradient,
    z_factor,
)
from .whole import whole_layer, whole_loss

__all__ = [
    "Loss",
    "Shard",
    "Slopes",
    "Stats",
    "capped",
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
    "slopes",
    "target_logits",
    "uniform_input_gradient",
    "unscaled_input_gradient",
    "weight_gradient",
    "z_factor",
    "whole_layer",
    "whole_loss",
]
