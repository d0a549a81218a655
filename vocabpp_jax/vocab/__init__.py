"""The vocabulary layers, sharded by rows over a mesh axis: pure functions over one device's arrays."""

from .input_layer import lookup, scatter
from .labels import IGNORED_LABEL, counted, refuse_outside
from .loss import Loss
from .output_layer import (
    Shard,
    Slopes,
    Stats,
    Target,
    capped,
    combine,
    exponentials,
    factor,
    input_gradient,
    logits,
    losses,
    partial_input_gradient,
    slopes,
    target_logits,
    uniform_input_gradient,
    unscaled_input_gradient,
    weight_gradient,
)
from .unsharded_head import whole_layer, whole_loss

__all__ = [
    "IGNORED_LABEL",
    "Loss",
    "Shard",
    "Slopes",
    "Stats",
    "Target",
    "capped",
    "combine",
    "counted",
    "exponentials",
    "factor",
    "input_gradient",
    "logits",
    "lookup",
    "losses",
    "partial_input_gradient",
    "refuse_outside",
    "scatter",
    "slopes",
    "target_logits",
    "uniform_input_gradient",
    "unscaled_input_gradient",
    "weight_gradient",
    "whole_layer",
    "whole_loss",
]
