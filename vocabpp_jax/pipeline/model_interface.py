"""The model interface of the pipeline: a few pure functions and one canonical parameter tree.

The executor, layouts and vocabulary layers access a model only through :class:`Model`, so it can be written in Flax or
any other library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from ..vocab import Loss

Params = Any  # a pytree of arrays
AuxInputs = dict[str, jax.Array]  # non-differentiated per-microbatch arrays, e.g. segment ids


def _identity(params: Params, x: jax.Array) -> jax.Array:
    return x


def _nothing(key: jax.Array) -> Params:
    return {}


@dataclass(frozen=True)
class TensorSplit:
    """How blocks are sharded over the mesh axis ``tensor``; see :mod:`vocabpp_jax.pipeline.tensor`."""

    block: Callable[[Params, jax.Array, AuxInputs], jax.Array]
    """A block that takes one device's part of the parameters and performs the sums over the axis itself."""
    specs: Params
    """PartitionSpecs in a tree like a block's parameters, naming the axis wherever a parameter is sharded."""
    parts: int
    """The size of the axis must divide this (the number of heads, if heads are not split)."""


@dataclass(frozen=True, eq=False)
class Tail:
    """Predicts ``depths`` tokens beyond the next, after the last layer; see :mod:`vocabpp_jax.models.tail`.

    The loss is ``main + weight / depths · Σ depth losses``, each a sum over tokens divided by the number of labels
    counted in the main loss, as published. At depth k, position i has the label of position i + k. It is counted if
    that label is, and if both positions are in the same row and document (``aux_inputs["segment_ids"]``).
    """

    depths: int
    weight: float
    """λ: the weight of all depths together, relative to the main loss."""
    depth: Callable[[Params, jax.Array, jax.Array, AuxInputs], jax.Array]
    """One depth: ``(depth_params, h [B, L, D], embedded [B, L, D], aux_inputs) -> h``, pure and dtype-preserving. At
    depth k, ``embedded`` is the input layer's output k tokens ahead, 0 past the end of the row. May have a method
    ``on(platform)``, as :attr:`Model.block`."""
    init_depth: Callable[[jax.Array, jax.Array], Params]
    """``(key, depth) -> depth_params`` in float32, like :attr:`Model.init_block`."""
    tensor: TensorSplit | None = None
    """How a depth runs on a mesh with an axis ``tensor``, or None if it cannot; its ``block`` has the signature of
    ``depth``."""

    def __post_init__(self) -> None:
        if self.depths < 1:
            raise ValueError(f"mtp_depth is {self.depths}; a tail needs at least 1; 0 means no tail")
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"mtp_weight is {self.weight}; it must be above 0 and finite")


@dataclass(frozen=True, eq=False)  # compared and hashed by identity, like its functions
class Model:
    """A decoder as the pipeline sees it: embedding, ``layers`` identical blocks, a final function, an LM head.

    Canonical parameters, as drawn by :meth:`init` and stored in checkpoints, are the tree::

        {"embed":  {"tokens": [V, D], "positions": [L, D]},   # "positions" only if `positions` is set
         "blocks": (block_0, ..., block_{layers-1}),           # same structure and shapes, in layer order
         "final":  ...,                                        # parameters of `final`, may be {}
         "head":   [V, D],                                     # absent if `tied`
         "tail":   (depth_1, ..., depth_D)}                    # absent without a `tail`

    Shapes: B batch, L length, N tokens, D model width, V vocabulary.
    """

    layers: int
    vocab_size: int
    width: int
    block: Callable[[Params, jax.Array, AuxInputs], jax.Array]
    """One layer: ``(block_params, x [B, L, D], aux_inputs) -> x [B, L, D]``, pure and dtype-preserving. If kernels
    depend on the device, it has a method ``on(platform)`` that returns the block for a
    :attr:`jax.Device.platform`."""
    init_block: Callable[[jax.Array, jax.Array], Params]
    """``(key, layer) -> block_params`` in float32: one layer's initial parameters. ``layer`` is an int32 scalar and may
    be traced, so that one program can draw a different layer on every device."""
    init_row: Callable[[jax.Array, str], jax.Array]
    """``(key, table) -> [D]`` in float32: one initial row of ``"tokens"``, ``"positions"`` or ``"head"``."""
    init_final: Callable[[jax.Array], Params] = _nothing
    """``(key) -> final_params`` in float32."""
    final: Callable[[Params, jax.Array], jax.Array] = _identity
    """Applied between the last block and the head, usually a norm: ``(final_params, x [N, D]) -> x [N, D]``."""
    positions: int | None = None
    """Rows of the learned position table, or None if there is none."""
    tied: bool = False
    """Whether the head is the token embedding."""
    embed_scale: float = 1.0
    """Factor on the embeddings (Gemma: the square root of the width)."""
    loss: Loss = Loss()
    """The training loss: cross entropy, optionally with a soft cap, a z-loss or label smoothing."""
    layer_aux_inputs: tuple[AuxInputs, ...] = ()
    """Untrained per-layer arrays, one dictionary per layer with the same names and shapes; empty if there are none. A
    block gets its own merged into ``aux_inputs``. Gemma 2's local and global layers differ by such a number."""
    tensor: TensorSplit | None = None
    """How blocks run on a mesh with an axis ``tensor``, or None if they cannot."""
    auxiliary: bool = False
    """Whether a block returns ``(x, scalar)``. In training, the scalars are summed over layers, averaged over
    microbatches and the data axis, and added to the loss. Used for the load balancing of routers."""
    tail: Tail | None = None
    """Predicts tokens beyond the next, or None."""
    param_dtype: Callable[[str], str | None] | None = None
    """Maps a parameter's path to the dtype in which passes use it. Paths are ``"blocks/router/kernel"``,
    ``"tail/..."``, ``"final/..."``, without layer numbers. None means the pipeline's ``compute_dtype``, which the
    vocabulary tables always have. For routers or norms in float32 within bfloat16 blocks, return ``"float32"``."""

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ValueError(f"layers is {self.layers}; a model needs at least 1")
        if self.vocab_size < 2:
            raise ValueError(f"vocab_size is {self.vocab_size}; a vocabulary needs at least 2 tokens")
        if self.layer_aux_inputs and len(self.layer_aux_inputs) != self.layers:
            raise ValueError(
                f"layer_aux_inputs has {len(self.layer_aux_inputs)} entries; give one for each of {self.layers} layers"
            )

    def init(self, key: jax.Array) -> Params:
        """All canonical parameters in float32 on one device; equal to those of :meth:`.Pipeline.init` for ``key``."""
        tables = {"tokens": self.vocab_size} | ({} if self.positions is None else {"positions": self.positions})
        params = {
            "embed": {name: self.draw_rows(key, name, jnp.arange(rows)) for name, rows in tables.items()},
            "blocks": tuple(self.draw_block(key, jnp.int32(layer)) for layer in range(self.layers)),
            "final": self.draw_final(key),
        }
        if not self.tied:
            params["head"] = self.draw_rows(key, "head", jnp.arange(self.vocab_size))
        if self.tail:
            params["tail"] = tuple(self.draw_depth(key, k) for k in range(self.depths))
        return params

    def draw_block(self, key: jax.Array, layer: jax.Array) -> Params:
        """The initial parameters of one layer."""
        return self.init_block(jax.random.fold_in(_key_of("blocks", key), layer), layer)

    def draw_rows(self, key: jax.Array, table: str, rows: jax.Array) -> jax.Array:
        """Initial rows ``[len(rows), D]`` of a table. A row depends only on its index, so shards draw their own."""
        key = _key_of(table, key)
        return jax.vmap(lambda row: self.init_row(jax.random.fold_in(key, row), table))(rows)

    def draw_depth(self, key: jax.Array, depth: int) -> Params:
        """The initial parameters of one depth of the tail, counted from 0."""
        return self.tail.init_depth(jax.random.fold_in(_key_of("tail", key), depth), jnp.int32(depth))

    @property
    def depths(self) -> int:
        """Number of tokens predicted beyond the next."""
        return self.tail.depths if self.tail else 0

    @property
    def tail_aux_inputs(self) -> AuxInputs:
        """The per-layer arrays of the tail's layers: those of the last layer."""
        return self.layer_aux_inputs[-1] if self.layer_aux_inputs else {}

    def draw_final(self, key: jax.Array) -> Params:
        """The initial parameters of the final function."""
        return self.init_final(_key_of("final", key))

    def dtypes(self, part: str, params: Params, compute_dtype: str) -> Params:
        """The dtype in which passes use each parameter of one block, one depth of the tail or the final function.

        Raises:
            ValueError: :attr:`param_dtype` returns a dtype other than float32 and bfloat16.
        """

        def of(path: tuple, _: Any) -> jnp.dtype:
            name = "/".join([part, jax.tree_util.keystr(path, simple=True, separator="/")])
            own = self.param_dtype(name) if self.param_dtype else None
            dtype = jnp.dtype(compute_dtype if own is None else own)
            if dtype not in (jnp.float32, jnp.bfloat16):
                raise ValueError(f"param_dtype gives {dtype} for {name!r}; it must be float32 or bfloat16")
            return dtype

        return jax.tree_util.tree_map_with_path(of, params)

    def param_shapes(self) -> Params:
        """The canonical tree of :class:`jax.ShapeDtypeStruct`; computes nothing."""
        one = replace(self, layers=1, layer_aux_inputs=self.layer_aux_inputs[:1])
        shapes = jax.eval_shape(lambda: one.init(jax.random.key(0, impl=_KEYS)))
        return shapes | {"blocks": shapes["blocks"] * self.layers}


_PARTS = ("blocks", "final", "tokens", "positions", "head", "tail")
_KEYS = "threefry2x32"  # jax's only generator that gives the same numbers alone, batched or sharded


def _key_of(part: str, key: jax.Array) -> jax.Array:
    """The key of one part of the model. Raises ValueError if ``key`` is not a threefry key."""
    kind = str(jax.random.key_impl(key))
    if kind != _KEYS:
        raise ValueError(
            f"key has implementation {kind}, which draws different parameters in every layout; "
            f"use jax.random.key(seed, impl={_KEYS!r})"
        )
    return jax.random.fold_in(key, _PARTS.index(part))
