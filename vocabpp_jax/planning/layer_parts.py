"""Parameters and residuals of one device's part of a layer, from the traced block."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from ..pipeline.linearize import linearize
from ..pipeline.model_interface import Model
from ..pipeline.tensor import TENSOR


class LayerPart(NamedTuple):
    """One device's part of a layer: its parameters, and the bytes per sequence in each ring."""

    parameters: int
    residual: int
    kept: int
    carried: int

    @property
    def stored(self) -> int:
        """Bytes per sequence in flight."""
        return self.residual + self.kept


@cache
def layer_part(model: Model, length: int, dtype: str, tensor: int, split: bool, platform: str) -> LayerPart:
    """A layer on one of ``tensor`` devices, for sequences of ``length`` tokens; ``split`` if weight gradients are a
    separate pass.

    No device is needed. The bytes are those that :meth:`vocabpp_jax.Pipeline.activation_bytes` counts.

    Raises:
        ValueError: cuDNN's attention cannot be traced because jax's GPU packages are not installed.
    """
    block = model.block if tensor == 1 else model.tensor.block
    block = block.on(platform) if hasattr(block, "on") else block
    layer = model.param_shapes()["blocks"][0]
    whole = jax.tree.map(lambda _: PartitionSpec(), layer)
    x = jax.ShapeDtypeStruct((1, length, model.width), dtype)
    own = model.layer_aux_inputs[0] if model.layer_aux_inputs else {}
    aux_inputs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), own)
    found: list[LayerPart] = []

    def trace(layer) -> None:
        dtypes = model.dtypes("blocks", layer, dtype)
        part = jax.tree.map(lambda w, dtype: jax.ShapeDtypeStruct(w.shape, dtype), layer, dtypes)
        passes = linearize(block, part, x, aux_inputs, split=split)
        rings = (passes.residual, passes.kept, passes.carried)
        stored = (sum(s.size * s.dtype.itemsize for s in ring) for ring in rings)
        found.append(LayerPart(sum(w.size for w in jax.tree.leaves(layer)), *stored))

    run = jax.shard_map(
        trace,
        mesh=AbstractMesh((tensor,), (TENSOR,), axis_types=(AxisType.Auto,)),
        in_specs=(whole if tensor == 1 else model.tensor.specs,),
        out_specs=None,
        check_vma=False,
    )
    try:
        jax.eval_shape(run, layer)
    except RuntimeError as problem:
        if "cuDNN" not in str(problem):
            raise
        raise ValueError(
            f"planning for GPUs traces cuDNN's attention, which needs jax's GPU packages and no GPU: "
            f"pip install 'vocabpp-jax[cuda12]' ({problem})"
        ) from None
    return found[0]
