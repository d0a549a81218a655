"""What a user would run instead of a pipeline with a sharded vocabulary: other programs for the same step.

All are a :class:`Contender`, so that one loop times them and one test holds them against one device.
"""

from __future__ import annotations

from collections.abc import Callable

from jax.sharding import Mesh

from vocabpp_jax.pipeline.model_interface import Model

from .contender import Contender, Ours
from .data_parallel import DataParallel, FullySharded, Separate
from .spmd_pipeline import SPMDPipeline

EVEN_SHARE = "even-share"
"""The one that is the ideal: every device alone with the whole model and its share of the microbatches."""
COMPARATORS: dict[str, Callable[[Model, Mesh, int, str], Contender]] = {
    EVEN_SHARE: Separate,
    "data-parallel": DataParallel,
    "fsdp": FullySharded,
    "spmd-pipeline": SPMDPipeline,
}
"""By name: ``(model, mesh, m, compute_dtype) -> contender``."""

__all__ = ["COMPARATORS", "EVEN_SHARE", "Contender", "DataParallel", "FullySharded", "Ours", "SPMDPipeline", "Separate"]
