"""The canonical form of a training state: the same arrays whichever pipeline layout produced them.

A state becomes one flat dictionary of named arrays: ``params.blocks.3.mlp.up.kernel``, ``optimizer.0.mu.head``,
``step``. Layers are in depth order; vocabulary tables are ``[V, D]``, without padding or interleaving across shards.
Entries are only moved, so a round trip is bit-exact. On the devices, each array is sharded over the whole mesh where
one of its axes allows it, so no host holds more than its share.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .. import training
from ..pipeline.pipeline import Pipeline

Flat = dict[str, Any]
"""Arrays or their shapes, by name."""
SMALL = 2**16
"""Arrays with fewer entries are not sharded: storing them whole is cheaper."""


@dataclass(frozen=True)
class Canonical:
    """Converts the training state of a pipeline and an optimizer to and from the canonical form.

    Raises:
        ValueError: the optimizer keeps arrays that are neither scalars nor shaped like the parameters, such as factored
            moments; there is no general way to convert those to another layout.
    """

    pipe: Pipeline
    optimizer: optax.GradientTransformation

    def __post_init__(self) -> None:
        for x in jax.tree.leaves(self._state.optimizer, is_leaf=self._like_params):
            if not self._like_params(x) and x.ndim:
                raise ValueError(
                    f"optimizer keeps an array of shape {list(x.shape)} that is neither a scalar nor part of a tree "
                    "shaped like the parameters; checkpoints could not take it to another layout"
                )

    @cached_property
    def shapes(self) -> Flat:
        """Every canonical array as a :class:`jax.ShapeDtypeStruct` with its sharding on this mesh."""
        return {
            _name(path): jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_sharding(self.pipe.mesh, x.shape))
            for path, x in jax.tree_util.tree_leaves_with_path(self._canonical)
        }

    @cached_property
    def flatten(self) -> Callable[[training.State], Flat]:
        """``state -> arrays``, compiled: copies the state into canonical form; the state may be donated afterwards."""

        def flatten(state: training.State) -> Flat:
            return {_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(self._unpacked(state))}

        return jax.jit(flatten, out_shardings={name: x.sharding for name, x in self.shapes.items()})

    @cached_property
    def unflatten(self) -> Callable[[Flat], training.State]:
        """``arrays -> state``, compiled: canonical arrays to a state in this pipeline's layout."""
        pack, structure = self.pipe.layout.pack, jax.tree.structure(self._canonical.params)

        def is_params(tree: Any) -> bool:
            return jax.tree.structure(tree) == structure

        def unflatten(flat: Flat) -> training.State:
            tree = jax.tree_util.tree_map_with_path(lambda path, _: flat[_name(path)], self._canonical)
            return jax.tree.map(lambda x: pack(x) if is_params(x) else x, tree, is_leaf=is_params)

        return jax.jit(unflatten, out_shardings=training.shardings(self.pipe, self.optimizer))

    @cached_property
    def _state(self) -> training.State:
        """Shapes of the state in the pipeline's layout."""
        return training.shapes(self.pipe, self.optimizer)

    @cached_property
    def _canonical(self) -> training.State:
        """Shapes of the state with canonical parameters and moments."""
        return jax.eval_shape(self._unpacked, self._state)

    def _unpacked(self, state: training.State) -> training.State:
        unpack = self.pipe.layout.unpack
        return jax.tree.map(lambda x: unpack(x) if self._like_params(x) else x, state, is_leaf=self._like_params)

    def _like_params(self, tree: Any) -> bool:
        params = self._state.params
        return jax.tree.structure(tree) == jax.tree.structure(params) and all(
            x.shape == y.shape for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True)
        )


def fingerprints(flat: Flat) -> list[int]:
    """A 32-bit fingerprint per array, in name order: independent of the number of devices, and different after a change
    to any single entry.

    It is ``Σ (2i + 1) · bits_i mod 2³²`` over the entries i. Integer sums do not depend on the order of addition.
    """
    return np.asarray(make_fingerprints(flat)(flat)).tolist()


def make_fingerprints(flat: Flat) -> Callable[[Flat], jax.Array]:
    """A compiled :func:`fingerprints` for arrays with these shardings."""
    sharding = next(iter(flat.values())).sharding
    everywhere = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
    return jax.jit(_fingerprints, out_shardings=everywhere)


def _fingerprints(flat: Flat) -> jax.Array:
    return jnp.stack([_fingerprint(flat[name]) for name in sorted(flat)])


def _fingerprint(x: jax.Array) -> jax.Array:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    index = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum((2 * index + 1) * bits, dtype=jnp.uint32)


def _sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Shard the first axis that the whole mesh divides, else the first that one mesh axis divides; else replicate.

    The first axis is usually also the one the resident parameter is sharded along, so little data moves.
    """
    if math.prod(shape) >= SMALL:
        for names in (mesh.axis_names, *((name,) for name in sorted(mesh.axis_names, key=lambda n: -mesh.shape[n]))):
            ways = math.prod(mesh.shape[name] for name in names)
            fitting = [axis for axis, size in enumerate(shape) if size % ways == 0]
            if fitting:
                return NamedSharding(mesh, PartitionSpec(*[None] * fitting[0], names))
    return NamedSharding(mesh, PartitionSpec())


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
