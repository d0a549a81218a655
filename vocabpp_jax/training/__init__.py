"""Training: the compiled step, its state, and AdamW."""

from .optimizer import DecayMask, adamw, warmup_cosine
from .step import (
    Metrics,
    State,
    global_norm,
    init_state,
    make_evaluation,
    make_start,
    make_step,
    shapes,
    shardings,
    start_from,
)

__all__ = [
    "DecayMask",
    "Metrics",
    "State",
    "adamw",
    "global_norm",
    "init_state",
    "make_evaluation",
    "make_start",
    "make_step",
    "shapes",
    "shardings",
    "start_from",
    "warmup_cosine",
]
