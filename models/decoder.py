"""From a configuration to a model: pure functions for the pipeline, or a Flax module without one.

Shapes: B batch, L length, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from vocabpp_jax.models.config import Config, attention_implementation
from vocabpp_jax.models.tail import Depth, PureDepth
from vocabpp_jax.pipeline.model_interface import AuxInputs, Model, Params, Tail, TensorSplit
from vocabpp_jax.pipeline.precision import exact_products
from vocabpp_jax.pipeline.tensor import TENSOR

_COLUMNS = {"qkv", "q", "k", "v", "gate", "up"}  # column-parallel: each device computes part of the outputs
_ROWS = {"out", "down", "project"}  # row-parallel: each device has part of the inputs


def build(config: Config, mtp_depth: int = 0, mtp_weight: float = 0.3) -> Model:
    """The pipeline's model for any architecture. ``block`` takes parameters in the dtype of ``x``.

    Block parameters are nested dicts by module: a norm has ``scale`` and perhaps ``bias [D]``, a linear layer ``kernel
    [in, out]`` and perhaps ``bias [out]``. With ``mtp_depth``, the model also predicts that many further tokens;
    ``mtp_weight`` is the total weight of their losses.
    """
    if mtp_depth < 0:
        raise ValueError(f"mtp_depth is {mtp_depth}; it must be 0, for none, or more")
    norm = _graphdef(config.norm)

    def final(params: Params, x_BLD: jax.Array) -> jax.Array:
        return nnx.merge(norm, params)(x_BLD)

    def init_block(key: jax.Array, layer: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(config.block(nnx.Rngs(key))))

    def init_row(key: jax.Array, table: str) -> jax.Array:
        return nnx.initializers.normal(config.init_std)(key, (config.hidden,), jnp.float32)

    def init_final(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(config.norm(nnx.Rngs(key))))

    shapes = nnx.to_pure_dict(nnx.state(_abstract(config.block)))
    return Model(
        layers=config.layers,
        vocab_size=config.vocab_size,
        width=config.hidden,
        block=PureBlock(config),
        init_block=init_block,
        init_row=init_row,
        init_final=init_final,
        final=final,
        positions=config.positions,
        tied=config.tie_embeddings,
        embed_scale=config.embed_scale,
        loss=config.loss,
        layer_aux_inputs=config.layer_aux_inputs,
        tensor=TensorSplit(
            block=PureBlock(config, TENSOR),
            specs=jax.tree_util.tree_map_with_path(_spec, shapes),
            parts=config.shared_heads,
        ),
        tail=_tail(config, mtp_depth, mtp_weight) if mtp_depth else None,
    )


def _tail(config: Config, depths: int, weight: float) -> Tail:
    def init(key: jax.Array, depth: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(Depth(config, None, nnx.Rngs(key))))

    shapes = nnx.to_pure_dict(nnx.state(_abstract(lambda rngs: Depth(config, None, rngs))))
    specs = jax.tree_util.tree_map_with_path(_spec, shapes)
    split = TensorSplit(block=PureDepth(config, TENSOR), specs=specs, parts=config.shared_heads)
    return Tail(depths=depths, weight=weight, depth=PureDepth(config), init_depth=init, tensor=split)


def _spec(path: tuple, shape: jax.ShapeDtypeStruct) -> PartitionSpec:
    """How a block's parameter is sharded over the ``tensor`` axis; norms, and biases added after the sum, are not."""
    layer, leaf = (path[-2].key if len(path) > 1 else None), path[-1].key
    if layer in _COLUMNS:
        return PartitionSpec(None, TENSOR) if leaf == "kernel" else PartitionSpec(TENSOR)
    return PartitionSpec(TENSOR) if layer in _ROWS and leaf == "kernel" else PartitionSpec()


def _abstract(make: Callable[[nnx.Rngs], nnx.Module]) -> nnx.Module:
    return nnx.eval_shape(lambda: make(nnx.Rngs(0)))


def _graphdef(make: Callable[[nnx.Rngs], nnx.Module]) -> Any:
    """The static half of a module, created without computing anything."""
    return nnx.graphdef(_abstract(make))


@dataclass(frozen=True)
class PureBlock:
    """One layer as a pure function, ``(params, x [B, L, D], aux_inputs) -> [B, L, D]``; with ``axis``, one device's
    part of it."""

    config: Config
    axis: str | None = None
    _graphdef: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        graphdef = _graphdef(lambda rngs: self.config.block(rngs, self.axis))
        object.__setattr__(self, "_graphdef", graphdef)

    def __call__(self, params: Params, x_BLD: jax.Array, aux_inputs: AuxInputs) -> jax.Array:
        return nnx.merge(self._graphdef, params)(x_BLD, aux_inputs)

    def on(self, platform: str) -> PureBlock:
        """The layer with the attention implementation for a platform."""
        return replace(self, config=replace(self.config, attention=attention_implementation(self.config, platform)))


class Decoder(nnx.Module):
    """The whole model, for use without a pipeline: ``tokens [B, L] -> logits [B, L, V]`` in float32.

    Parameters are float32 and cast to ``config.dtype`` once per call. :meth:`canonical` and :meth:`from_canonical`
    exchange them with pipelines and checkpoints, without a tail.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        params = build(config).init(rngs.params())
        block = _graphdef(config.block)
        self.config = config
        for name, table in params["embed"].items():
            setattr(self, name, nnx.Param(table))
        self.blocks = nnx.List([nnx.merge(block, one) for one in params["blocks"]])
        self.final = nnx.merge(_graphdef(config.norm), params["final"])
        if not config.tie_embeddings:
            self.head = nnx.Param(params["head"])

    def __call__(self, tokens_BL: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """Logits; raises ValueError if L exceeds ``config.seq``. ``segment_ids [B, L]`` as in ``parts.Block``."""
        config, L = self.config, tokens_BL.shape[1]
        if L > config.seq:
            raise ValueError(f"tokens are {L} long; seq, the longest this model takes, is {config.seq}")
        cast = jax.tree.map(lambda array: array.astype(config.dtype), self)
        x_BLD = cast.tokens[...][tokens_BL] * jnp.asarray(config.embed_scale, config.dtype)
        if config.positions is not None:
            x_BLD = x_BLD + cast.positions[:L]
        aux_inputs = {} if segment_ids is None else {"segment_ids": segment_ids}
        head_VD = cast.tokens[...] if config.tie_embeddings else cast.head[...]
        with exact_products(config.dtype):
            for block, own in zip(cast.blocks, config.layer_aux_inputs or ({},) * config.layers, strict=True):
                x_BLD = block(x_BLD, aux_inputs | own)
            logits_BLV = jnp.einsum("BLD,VD->BLV", cast.final(x_BLD), head_VD, preferred_element_type=jnp.float32)
        cap = config.loss.soft_cap
        return logits_BLV if cap is None else cap * jnp.tanh(logits_BLV / cap)

    def canonical(self) -> Params:
        """The canonical parameters, see :class:`vocabpp_jax.pipeline.Model`."""
        state = nnx.to_pure_dict(nnx.state(self))
        blocks = state.pop("blocks")
        embed = {name: state.pop(name) for name in ("tokens", "positions") if name in state}
        return {"embed": embed, "blocks": tuple(blocks[i] for i in range(self.config.layers)), **state}

    @classmethod
    def from_canonical(cls, config: Config, params: Params) -> Decoder:
        """A model holding canonical parameters, without copying them."""
        state = {**params, **params["embed"], "blocks": dict(enumerate(params["blocks"]))}
        del state["embed"]
        state.pop("tail", None)
        return nnx.merge(_graphdef(lambda rngs: cls(config, rngs=rngs)), state)
