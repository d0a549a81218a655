"""What one device's part of a layer holds: parameters, and what is stored between its passes, from the traced block."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, PartitionSpec

from ..models import Config, build
from ..models.config import attention_implementation
from ..pipeline.linearize import linearize
from ..pipeline.tensor import TENSOR


class LayerPart(NamedTuple):
    """One device's part of a layer: its parameters, and the bytes that a sequence leaves in each ring."""

    parameters: int
    residual: int
    kept: int
    carried: int

    @property
    def stored(self) -> int:
        """Bytes of a sequence in flight."""
        return self.residual + self.kept


@cache
def layer_part(config: Config, tensor: int, residuals: str, split: bool, platform: str = "gpu") -> LayerPart:
    """A layer on one of ``tensor`` devices; ``split`` where weight gradients are a pass of their own. No device is
    needed. What is counted is what :meth:`vocabpp_jax.Pipeline.activation_bytes` counts."""
    config = replace(config, residuals=residuals)
    model = build(replace(config, attention=attention_implementation(config, platform)))
    block = (model.block if tensor == 1 else model.tensor.block).on(platform)
    layer = model.param_shapes()["blocks"][0]
    whole = jax.tree.map(lambda _: PartitionSpec(), layer)
    x = jax.ShapeDtypeStruct((1, config.seq, config.hidden), config.dtype)
    side = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), model.layer_side[:1])
    found: list[LayerPart] = []

    def trace(layer) -> None:
        part = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, config.dtype), layer)
        passes = linearize(block, part, x, side[0] if side else {}, split=split)
        stored = (
            sum(s.size * s.dtype.itemsize for s in ring) for ring in (passes.residual, passes.kept, passes.carried)
        )
        found.append(LayerPart(sum(w.size for w in jax.tree.leaves(layer)), *stored))

    run = jax.shard_map(
        trace,
        mesh=AbstractMesh((tensor,), (TENSOR,)),
        in_specs=(whole if tensor == 1 else model.tensor.specs,),
        out_specs=None,
        check_vma=False,
    )
    jax.eval_shape(run, layer)
    return found[0]
