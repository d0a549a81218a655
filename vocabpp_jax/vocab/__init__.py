"""Vocabulary layers sharded by rows over a mesh axis, as pure functions on one device's arrays."""

from .input_layer import lookup, scatter
from .labels import IGNORED_LABEL, ahead, counted, refuse_outside
from .loss import Loss
from .output_layer import (
    Coefficients,
    Kept,
    Shard,
    Stats,
    Target,
    coefficients,
    combine,
    exponentials,
    input_gradient,
    logits,
    losses,
    partial_input_gradient,
    uniform_input_gradient,
    unscaled_input_gradient,
    weight_gradient,
)
from .sums import from_units, in_units, summed_dtype, unit
from .unsharded_head import whole_layer, whole_loss

__all__ = [
    "IGNORED_LABEL",
    "Coefficients",
    "Kept",
    "Loss",
    "Shard",
    "Stats",
    "Target",
    "ahead",
    "coefficients",
    "combine",
    "counted",
    "exponentials",
    "from_units",
    "in_units",
    "input_gradient",
    "logits",
    "lookup",
    "losses",
    "partial_input_gradient",
    "refuse_outside",
    "scatter",
    "summed_dtype",
    "uniform_input_gradient",
    "unit",
    "unscaled_input_gradient",
    "weight_gradient",
    "whole_layer",
    "whole_loss",
]
