"""Where every parameter lives: from the canonical tree to a pipeline's, and back.

In the pipeline's layout every leaf that belongs to a device has its devices in front:

* ``blocks[chunk][j]`` is the j-th layer of every device's chunk, leaves ``[p, ...]``, split over ``pipe``. A device
  with fewer layers than the longest holds zeros there.
* Sharded vocabulary: ``embed.tokens`` and ``head`` are ``[V_padded, D]``, rows split over ``pipe``.
* Unsharded (baseline): one table a device, ``[p, V, D]``: the embedding on the first stage's device, the head on the
  last stage's, zeros between, since one program gives every device the same shapes. A device that holds both of an
  untied model needs a second table, ``head``.
* ``final`` is on every device.
* ``tail`` is a layer like the others, one for each depth, on the last stage's device. Where the vocabulary is not
  sharded and the first stage is on another, ``ahead`` is a copy of the tables in ``embed`` beside it.

With a mesh axis ``tensor`` of size T each block's leaf is split over it as the model says, and a sharded vocabulary has
``p T`` shards, one a device; what is unsharded, and ``final``, is the same on all T.

That is where parameters are in use. At rest, between steps, each is also split over the axis ``data``, if ``data`` is
its size: see :mod:`vocabpp_jax.pipeline.shares`.
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
ROW_MULTIPLE = 8  # rows a shard are padded to this, which is what matrix units want


@dataclass(frozen=True)
class Layout:
    """The placement of a model's parameters under a schedule, on a mesh whose axis ``tensor`` is of size ``tensor``.

    ``data`` copies of the model share them at rest; 1 where each keeps all.
    """

    model: Model
    schedule: Schedule
    tensor: int = 1
    data: int = 1

    def __post_init__(self) -> None:
        split = self.model.tensor
        if self.tensor > 1 and split is None:
            raise ValueError(f"tensor is {self.tensor}; this model says nothing of a tensor axis, so it must be 1")
        if self.tensor > 1 and split.parts % self.tensor:
            raise ValueError(
                f"tensor is {self.tensor}; it must divide the {split.parts} parts that a layer has (heads)"
            )
        if self.tensor > 1 and self.model.tail and self.model.tail.tensor is None:
            raise ValueError(f"tensor is {self.tensor}; this model's tail says nothing of a tensor axis: use 1")
        if self.tensor > 1:
            self._check_split()
        if sum(self.layer_counts) != self.model.layers:
            raise ValueError(
                f"layer_counts {self.layer_counts} add up to {sum(self.layer_counts)}; "
                f"the model has {self.model.layers} layers"
            )

    @property
    def sharded(self) -> bool:
        """Whether the vocabulary is split over the pipeline."""
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
        """The mesh axes that a sharded vocabulary is split over."""
        return (PIPE, TENSOR) if self.tensor > 1 else (PIPE,)

    @property
    def shards(self) -> int:
        """Shards of a sharded vocabulary."""
        return self.schedule.p * self.tensor

    @cached_property
    def layer_counts(self) -> tuple[int, ...]:
        """Layers of every stage; where the split is uneven, later stages have one more, a depth of the tail counted as
        one of the last stage's."""
        if self.schedule.layer_counts is not None:
            return self.schedule.layer_counts
        stages, layers = self.schedule.stages, self.model.layers
        needed = stages - (self.model.depths > 0 and stages > 1)
        if layers < needed:
            raise ValueError(f"layers is {layers}; {needed} stages need at least one each, so {needed} or more")
        return even_split(layers, stages, self.model.depths)

    @cached_property
    def stage_of(self) -> tuple[tuple[int, ...], ...]:
        """The stage that is chunk c of device d, ``[chunks][p]``."""
        return tuple(map(tuple, self.schedule.stage_of.tolist()))

    @cached_property
    def depth(self) -> int:
        """Layers to allocate for every stage: the longest one's."""
        return max(self.layer_counts)

    @cached_property
    def layer_of(self) -> tuple[tuple[tuple[int | None, ...], ...], ...]:
        """The layer at ``[chunk][j][device]``, None where that device's stage is shorter."""
        first = [sum(self.layer_counts[:stage]) for stage in range(self.schedule.stages)]
        return tuple(
            tuple(tuple(first[s] + j if j < self.layer_counts[s] else None for s in stages) for j in range(self.depth))
            for stages in self.stage_of
        )

    @cached_property
    def layer_aux_inputs(self) -> tuple[tuple[dict[str, np.ndarray], ...], ...]:
        """The model's, at ``[chunk][j]``, leaves ``[p, ...]``; where a stage is shorter, some layer's."""
        own = self.model.layer_aux_inputs or ({},) * self.model.layers
        return tuple(
            tuple(jax.tree.map(lambda *xs: np.stack(xs), *(own[n or 0] for n in layers)) for layers in chunk)
            for chunk in self.layer_of
        )

    @property
    def head_is_embedding(self) -> bool:
        """Whether embedding and head share an array: tied, or the two ends of an unsharded pipeline."""
        return self.model.tied or (not self.sharded and self.apart)

    @property
    def tied_across(self) -> bool:
        """Whether a tied table exists twice, on the first and on the last stage's device."""
        return self.model.tied and not self.sharded and self.apart

    @property
    def apart(self) -> bool:
        """Whether first and last stage are on different devices."""
        return self.schedule.placement[0] != self.schedule.placement[-1]

    @property
    def copied(self) -> tuple[str, ...]:
        """The tables of an unsharded embedding that the tail needs a copy of on the last stage's device. A tied token
        table is there."""
        if self.sharded or not self.apart or not self.model.tail:
            return ()
        return (() if self.model.tied else ("tokens",)) + (() if self.model.positions is None else ("positions",))

    def padded(self, rows: int) -> int:
        """Rows of a sharded table: a multiple of the shards, each of a multiple of :data:`ROW_MULTIPLE` rows that the
        copies divide."""
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
        """The PartitionSpec of every leaf of the pipeline's tree, at rest."""
        return jax.tree.map(lambda share, spec: share.spec(spec), self.shares, self.specs_in_use())

    def specs_in_use(self) -> Params:
        """The PartitionSpec of every leaf while passes run."""
        tree = self.shapes_in_use()
        whole = {key: jax.tree.map(lambda _: PartitionSpec(), branch) for key, branch in tree.items()}
        tables = PartitionSpec(self.vocabulary_axes) if self.sharded else PartitionSpec(PIPE)
        specs = {key: jax.tree.map(lambda _: tables, tree[key]) for key in ("embed", "head", "ahead") if key in tree}
        if self.tensor == 1:
            specs |= {
                key: jax.tree.map(lambda _: PartitionSpec(PIPE), tree[key]) for key in ("blocks", "tail") if key in tree
            }
        else:
            layer = _behind_pipe(self.model.tensor.specs)
            specs["blocks"] = tuple(tuple(layer for _ in chunk) for chunk in tree["blocks"])
            if self.model.tail:
                specs["tail"] = (_behind_pipe(self.model.tail.tensor.specs),) * self.model.depths
        return whole | specs

    def shapes(self) -> Params:
        """The pipeline's tree as global :class:`jax.ShapeDtypeStruct`, at rest."""
        return jax.eval_shape(self.pack, self.model.param_shapes())

    def shapes_in_use(self) -> Params:
        """The same while passes run, without the padding of shares."""
        return jax.eval_shape(self._placed, self.model.param_shapes())

    def pack(self, canonical: Params) -> Params:
        """Canonical parameters (or gradients) in the pipeline's layout."""
        return jax.tree.map(Share.pad, self.shares, self._placed(canonical))

    def _placed(self, canonical: Params) -> Params:
        blocks = canonical["blocks"]
        empty = jax.tree.map(jnp.zeros_like, blocks[0])

        def stack(layers: tuple[int | None, ...]) -> Params:
            return jax.tree.map(lambda *xs: jnp.stack(xs), *(empty if n is None else blocks[n] for n in layers))

        packed = {
            "blocks": tuple(tuple(stack(layers) for layers in chunk) for chunk in self.layer_of),
            "final": canonical["final"],
            "embed": {},
        }
        last = self.schedule.placement[-1]
        if self.model.tail:
            packed["tail"] = jax.tree.map(partial(self._on, last), canonical["tail"])
        if self.sharded:
            for name, table in canonical["embed"].items():
                packed["embed"][name] = self._pad(table)
            if not self.model.tied:
                packed["head"] = self._pad(canonical["head"])
            return packed
        first = self.schedule.placement[0]
        for name, table in canonical["embed"].items():
            packed["embed"][name] = self._on(first, table)
        if self.copied:
            packed["ahead"] = {name: self._on(last, canonical["embed"][name]) for name in self.copied}
        head = canonical["embed"]["tokens"] if self.model.tied else canonical["head"]
        if self.apart:
            packed["embed"]["tokens"] = packed["embed"]["tokens"].at[last].set(head)
        elif not self.model.tied:
            packed["head"] = self._on(last, head)
        return packed

    def unpack(self, packed: Params) -> Params:
        """The canonical tree of parameters (or gradients, or optimizer moments) in the pipeline's layout."""
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
        """1 where a leaf's entries count, 0 where they repeat another's: what a global norm must be weighted with."""
        ones = jax.tree.map(lambda _: 1.0, self.shapes())
        if self.tied_across:
            first = jnp.arange(self.schedule.p) == self.schedule.placement[0]
            ones["embed"]["tokens"] = first.astype(jnp.float32)[:, None, None]
        if self.copied:
            ones["ahead"] = dict.fromkeys(self.copied, 0.0)
        return ones

    def _pad(self, table: jax.Array) -> jax.Array:
        return jnp.pad(table, ((0, self.padded(table.shape[0]) - table.shape[0]), (0, 0)))

    def _on(self, device: int, table: jax.Array) -> jax.Array:
        return jnp.zeros((self.schedule.p, *table.shape), table.dtype).at[device].set(table)


def _behind_pipe(specs: Params) -> Params:
    """Specs of a layer with the stages in front."""
    return jax.tree.map(lambda s: PartitionSpec(PIPE, *s), specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
