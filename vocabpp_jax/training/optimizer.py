"""AdamW with warm-up and cosine decay, the optimizer that the experiments use.

Nothing here reduces over parameters, so it works with any layout of them. Clipping needs the norm over all stages and
shards; the train step does it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

DecayMask = Callable[[Any], Any]
"""``params -> the same tree of bools``: True for parameters with weight decay, usually the matrices."""


def warmup_cosine(peak_lr: float, steps: int, warmup: int, final_lr: float = 0.0) -> optax.Schedule:
    """The learning rate of step 0, 1, ...: linear warm-up to ``peak_lr`` over ``warmup`` steps, then a cosine to
    ``final_lr``.

    The rate of step 0 is not zero but ``peak_lr / warmup``. From ``steps`` on it is ``final_lr``.
    """
    if not peak_lr > 0:
        raise ValueError(f"peak_lr is {peak_lr}; it must be above 0")
    if not 0 <= final_lr <= peak_lr:
        raise ValueError(f"final_lr is {final_lr}; it must lie between 0 and peak_lr, which is {peak_lr}")
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup is {warmup}; it must be at least 0 and less than steps, which is {steps}")
    cosine = optax.cosine_decay_schedule(peak_lr, steps - warmup, alpha=final_lr / peak_lr)
    if not warmup:
        return cosine
    return optax.join_schedules([optax.linear_schedule(peak_lr / warmup, peak_lr, warmup - 1 or 1), cosine], [warmup])


def matrices(params: Any) -> Any:
    """True where a leaf is a matrix of the model, False for vectors (norms, biases) and scalars.

    Works on a pipeline's parameters, whose layers have leading device axes, on canonical ones, and on any other tree.
    """
    if not (isinstance(params, dict) and "blocks" in params):
        return jax.tree.map(lambda x: x.ndim >= 2, params)
    in_front = type(params["blocks"][0]) is tuple  # tuples by chunk, then by layer
    of_layers = ("blocks", "tail") if in_front else ()
    return {k: jax.tree.map(lambda x, k=k: x.ndim - (k in of_layers) >= 2, branch) for k, branch in params.items()}


def adamw(
    peak_lr: float,
    steps: int,
    warmup: int,
    *,
    final_lr: float | None = None,
    weight_decay: float = 0.1,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    decay_mask: DecayMask = matrices,
) -> optax.GradientTransformation:
    """AdamW over :func:`warmup_cosine`; ``final_lr`` defaults to a tenth of ``peak_lr``.

    ``decay_mask`` selects the parameters with weight decay; by default the :func:`matrices`.
    """
    if weight_decay < 0:
        raise ValueError(f"weight_decay is {weight_decay}; it must not be negative")
    for name, value in (("b1", b1), ("b2", b2)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 0 and below 1")
    schedule = warmup_cosine(peak_lr, steps, warmup, peak_lr / 10 if final_lr is None else final_lr)
    return optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decay_mask)
