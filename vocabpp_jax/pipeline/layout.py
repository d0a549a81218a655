"""Placement of every parameter: conversion from the canonical tree to a pipeline's tree, and back.

In a pipeline's tree, leaves that differ between devices have a leading device axis:

* ``blocks[chunk][j]`` is the j-th layer of every device's chunk, leaves ``[p, ...]``, sharded over ``pipe``. Devices
  with fewer layers than the longest stage hold zeros there.
* Sharded vocabulary: ``embed.tokens`` and ``head`` are ``[V_padded, D]``, with rows sharded over ``pipe``.
* Unsharded vocabulary (baseline): one table per device, ``[p, V, D]``: the embedding on the first stage's device, the
  head on the last stage's, zeros elsewhere, because a single program gives every device the same shapes. If one device
  holds both and the model is untied, there is a second table, ``head``.
* ``final`` is replicated.
* ``tail`` has one layer per depth, stored like any other layer, on the last stage's device. If the vocabulary is
  unsharded and the first stage is on another device, ``ahead`` is a copy of ``embed``'s tables next to the tail.

With a mesh axis ``tensor`` of size T, each block's leaf is also sharded over it as the model specifies, and a sharded
vocabulary has ``p T`` shards, one per device. Unsharded tables and ``final`` are replicated over T.

This is the layout in use. At rest, between steps, each parameter is also sharded over the mesh axis ``data`` if the
layout's ``data`` is its size: see :mod:`vocabpp_jax.pipeline.shares`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from ..schedules import Schedule
from ..schedules.layers import even_split
from .mesh import PIPE
from .model_interface import Model
from .shares import Share, share_of
from .tensor import TENSOR

Params = Any
ROW_MULTIPLE = 8  # rows per shard are padded to a multiple of this, to suit matrix units


@dataclass(frozen=True)
class Layout:
    """The placement of a model's parameters under a schedule, on a mesh whose axis ``tensor`` has size ``tensor``.

    At rest, parameters are sharded over ``data`` model copies; 1 means that every copy holds all of them.
    """

    model: Model
    schedule: Schedule
    tensor: int = 1
    data: int = 1

    def __post_init__(self) -> None:
        split = self.model.tensor
        if self.tensor > 1 and split is None:
            raise ValueError(f"tensor is {self.tensor}; this model does not support a tensor axis, so it must be 1")
        if self.tensor > 1 and split.parts % self.tensor:
            raise ValueError(f"tensor is {self.tensor}; it must divide a layer's {split.parts} parts (heads)")
        if self.tensor > 1 and self.model.tail and self.model.tail.tensor is None:
            raise ValueError(f"tensor is {self.tensor}; this model's tail does not support a tensor axis: use 1")
        if self.tensor > 1:
            self._check_split()
        if sum(self.layer_counts) != self.model.layers:
            raise ValueError(
                f"layer_counts {self.layer_counts} add up to {sum(self.layer_counts)}; "
                f"the model has {self.model.layers} layers"
            )

    @property
    def sharded(self) -> bool:
        """Whether the vocabulary is sharded over the pipeline."""
        return self.schedule.sharded

    def _check_split(self) -> None:
        model, shapes = self.model, self.model.param_shapes()
        parts = [(shapes["blocks"][0], model.tensor)]
        parts += [(shapes["tail"][0], model.tail.tensor)] if model.tail else []
        for tree, split in parts:
            specs = jax.tree.leaves(split.specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
            for (path, shape), spec in zip(jax.tree_util.tree_leaves_with_path(tree), specs, strict=True):
                for size, axis in zip(shape.shape, spec, strict=False):
                    if axis == TENSOR and size % self.tensor:
                        where = jax.tree_util.keystr(path, simple=True, separator=".")
                        raise ValueError(
                            f"tensor is {self.tensor}; it must divide {size}, an axis of {where} {list(shape.shape)}"
                        )

    @property
    def vocabulary_axes(self) -> tuple[str, ...]:
        """The mesh axes over which a vocabulary is sharded."""
        return (PIPE, TENSOR) if self.tensor > 1 else (PIPE,)

    @property
    def shards(self) -> int:
        """Number of shards of a sharded vocabulary."""
        return self.schedule.p * self.tensor

    @cached_property
    def layer_counts(self) -> tuple[int, ...]:
        """Layers per stage. In an uneven split later stages get one more; each depth of the tail counts as a layer of
        the last stage."""
        if self.schedule.layer_counts is not None:
            return self.schedule.layer_counts
        stages, layers = self.schedule.stages, self.model.layers
        needed = stages - (self.model.depths > 0 and stages > 1)
        if layers < needed:
            raise ValueError(f"layers is {layers}; {needed} stages need at least one each, so {needed} or more")
        return even_split(layers, stages, self.model.depths)

    @cached_property
    def stage_of(self) -> tuple[tuple[int, ...], ...]:
        """The stage at chunk c of device d, ``[chunks][p]``."""
        return tuple(map(tuple, self.schedule.stage_of.tolist()))

    @cached_property
    def depth(self) -> int:
        """Layers to allocate per stage: those of the longest stage."""
        return max(self.layer_counts)

    @cached_property
    def layer_of(self) -> tuple[tuple[tuple[int | None, ...], ...], ...]:
        """The layer at ``[chunk][j][device]``, None if that device's stage is shorter."""
        first = [sum(self.layer_counts[:stage]) for stage in range(self.schedule.stages)]
        return tuple(
            tuple(tuple(first[s] + j if j < self.layer_counts[s] else None for s in stages) for j in range(self.depth))
            for stages in self.stage_of
        )

    @cached_property
    def layer_aux_inputs(self) -> tuple[tuple[dict[str, np.ndarray], ...], ...]:
        """The model's ``layer_aux_inputs`` at ``[chunk][j]``, leaves ``[p, ...]``; arbitrary for shorter stages."""
        own = self.model.layer_aux_inputs or ({},) * self.model.layers
        return tuple(
            tuple(jax.tree.map(lambda *xs: np.stack(xs), *(own[n or 0] for n in layers)) for layers in chunk)
            for chunk in self.layer_of
        )

    @property
    def head_is_embedding(self) -> bool:
        """Whether embedding and head share an array: tied, or on different devices of an unsharded pipeline."""
        return self.model.tied or (not self.sharded and self.apart)

    @property
    def tied_across(self) -> bool:
        """Whether a tied table is duplicated on the first and the last stage's device."""
        return self.model.tied and not self.sharded and self.apart

    @property
    def apart(self) -> bool:
        """Whether the first and last stage are on different devices."""
        return self.schedule.placement[0] != self.schedule.placement[-1]

    @property
    def copied(self) -> tuple[str, ...]:
        """The unsharded embedding tables that the tail needs copied to the last stage's device. A tied token table is
        already there."""
        if self.sharded or not self.apart or not self.model.tail:
            return ()
        return (() if self.model.tied else ("tokens",)) + (() if self.model.positions is None else ("positions",))

    def padded(self, rows: int) -> int:
        """Padded rows of a sharded table: every shard gets equally many, a multiple of :data:`ROW_MULTIPLE` and of the
        number of copies."""
        multiple = self.shards * math.lcm(ROW_MULTIPLE, self.data)
        return -(-rows // multiple) * multiple

    @cached_property
    def shares(self) -> Params:
        """The :class:`.Share` of every leaf."""
        sizes = {PIPE: self.schedule.p, TENSOR: self.tensor}
        return jax.tree.map(
            lambda x, spec: share_of(x.shape, spec, sizes, self.data), self.shapes_in_use(), self.specs_in_use()
        )

    def specs(self) -> Params:
        """The PartitionSpec of every leaf of the pipeline's tree at rest."""
        return jax.tree.map(lambda share, spec: share.spec(spec), self.shares, self.specs_in_use())

    def specs_in_use(self) -> Params:
        """The PartitionSpec of every leaf in use."""
        tree = self.shapes_in_use()
        whole = {key: jax.tree.map(lambda _: PartitionSpec(), branch) for key, branch in tree.items()}
        tables = PartitionSpec(self.vocabulary_axes) if self.sharded else PartitionSpec(PIPE)
        specs = {key: jax.tree.map(lambda _: tables, tree[key]) for key in ("embed", "head", "ahead") if key in tree}
        if self.tensor == 1:
            specs |= {
                key: jax.tree.map(lambda _: PartitionSpec(PIPE), tree[key]) for key in ("blocks", "tail") if key in tree
            }
        else:
            layer = _prepend_pipe(self.model.tensor.specs)
            specs["blocks"] = tuple(tuple(layer for _ in chunk) for chunk in tree["blocks"])
            if self.model.tail:
                specs["tail"] = (_prepend_pipe(self.model.tail.tensor.specs),) * self.model.depths
        return whole | specs

    def shapes(self) -> Params:
        """The pipeline's tree of global :class:`jax.ShapeDtypeStruct` at rest."""
        return jax.eval_shape(self.pack, self.model.param_shapes())

    def shapes_in_use(self) -> Params:
        """The same in use, without the padding of shares."""
        return jax.eval_shape(self._place, self.model.param_shapes())

    def pack(self, canonical: Params, xp: Any = jnp) -> Params:
        """Converts canonical parameters (or gradients) to the pipeline's tree at rest; on the host with ``xp=np``."""
        return jax.tree.map(partial(Share.pad, xp=xp), self.shares, self._place(canonical, xp))

    def _place(self, canonical: Params, xp: Any = jnp) -> Params:
        blocks = canonical["blocks"]
        empty = jax.tree.map(xp.zeros_like, blocks[0])

        def stack(layers: tuple[int | None, ...]) -> Params:
            return jax.tree.map(lambda *xs: xp.stack(xs), *(empty if n is None else blocks[n] for n in layers))

        def on_device(device: int, table: jax.Array, others: jax.Array | None = None) -> jax.Array:
            chosen = (xp.arange(self.schedule.p) == device).reshape(-1, *[1] * table.ndim)
            return xp.where(chosen, table, xp.zeros_like(table) if others is None else others)

        def pad(table: jax.Array) -> jax.Array:
            return xp.pad(table, ((0, self.padded(table.shape[0]) - table.shape[0]), (0, 0)))

        packed = {
            "blocks": tuple(tuple(stack(layers) for layers in chunk) for chunk in self.layer_of),
            "final": canonical["final"],
            "embed": {},
        }
        last = self.schedule.placement[-1]
        if self.model.tail:
            packed["tail"] = jax.tree.map(partial(on_device, last), canonical["tail"])
        if self.sharded:
            for name, table in canonical["embed"].items():
                packed["embed"][name] = pad(table)
            if not self.model.tied:
                packed["head"] = pad(canonical["head"])
            return packed
        first = self.schedule.placement[0]
        for name, table in canonical["embed"].items():
            packed["embed"][name] = on_device(first, table)
        if self.copied:
            packed["ahead"] = {name: on_device(last, canonical["embed"][name]) for name in self.copied}
        head = canonical["embed"]["tokens"] if self.model.tied else canonical["head"]
        if self.apart:
            packed["embed"]["tokens"] = on_device(last, head, packed["embed"]["tokens"])
        elif not self.model.tied:
            packed["head"] = on_device(last, head)
        return packed

    def unpack(self, packed: Params) -> Params:
        """Inverse of :meth:`pack`, for parameters, gradients or optimizer moments."""
        packed = jax.tree.map(Share.cut, self.shares, packed)
        place = {
            n: (c, j, d)
            for c, chunk in enumerate(self.layer_of)
            for j, layers in enumerate(chunk)
            for d, n in enumerate(layers)
            if n is not None
        }
        blocks = tuple(
            jax.tree.map(lambda x, d=place[n][2]: x[d], packed["blocks"][place[n][0]][place[n][1]])
            for n in range(self.model.layers)
        )
        canonical = {"embed": {}, "blocks": blocks, "final": packed["final"]}
        first, last = self.schedule.placement[0], self.schedule.placement[-1]
        for name, table in packed["embed"].items():
            rows = self.model.vocab_size if name == "tokens" else self.model.positions
            canonical["embed"][name] = table[:rows] if self.sharded else table[first]
        if not self.model.tied:
            head = packed["embed"]["tokens"] if self.head_is_embedding else packed["head"]
            canonical["head"] = head[: self.model.vocab_size] if self.sharded else head[last]
        if self.model.tail:
            canonical["tail"] = jax.tree.map(lambda x: x[last], packed["tail"])
        return canonical

    def unique(self) -> Params:
        """Weights for a global norm: 1 for a leaf's entries, 0 where they duplicate another leaf's."""
        ones = jax.tree.map(lambda _: 1.0, self.shapes())
        if self.tied_across:
            first = jnp.arange(self.schedule.p) == self.schedule.placement[0]
            ones["embed"]["tokens"] = first.astype(jnp.float32)[:, None, None]
        if self.copied:
            ones["ahead"] = dict.fromkeys(self.copied, 0.0)
        return ones


def _prepend_pipe(specs: Params) -> Params:
    """Specs of a layer with the axis ``pipe`` prepended."""
    return jax.tree.map(lambda s: PartitionSpec(PIPE, *s), specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
