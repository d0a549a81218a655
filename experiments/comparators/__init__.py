"""Alternatives to a pipeline with a sharded vocabulary: other programs for the same step.

Each is a :class:`Contender`, so one loop can time them and one test can compare them with a single device.
"""

from __future__ import annotations

from collections.abc import Callable

from jax.sharding import Mesh

from vocabpp_jax.pipeline.model_interface import Model

from .contender import Contender, Ours
from .data_parallel import DataParallel, FullySharded, Separate
from .spmd_pipeline import SPMDPipeline

EVEN_SHARE = "even-share"
"""The name of the ideal: every device has the whole model and computes its share of the microbatches alone."""
COMPARATORS: dict[str, Callable[[Model, Mesh, int, str], Contender]] = {
    EVEN_SHARE: Separate,
    "data-parallel": DataParallel,
    "fsdp": FullySharded,
    "spmd-pipeline": SPMDPipeline,
}
"""By name: ``(model, mesh, m, compute_dtype) -> contender``."""

__all__ = ["COMPARATORS", "EVEN_SHARE", "Contender", "DataParallel", "FullySharded", "Ours", "SPMDPipeline", "Separate"]
