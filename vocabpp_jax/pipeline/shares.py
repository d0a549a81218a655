"""Parameters at rest: between steps every copy of the model on the mesh axis ``data`` keeps a share of them.

A step gathers the compute-dtype copy that passes take, and leaves each copy the sum of its share of the gradients; the
float32 parameters and the optimizer's state are nowhere whole (ZeRO's stages 1 and 2, arXiv 1910.02054).

A share is a piece of one axis. Where the copies divide none, one is padded with zeros at its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from .mesh import DATA

MOST_PADDING = 1 / 8
"""An axis that would grow by more is not padded. Where all would, as in a very short vector, every copy keeps it."""


@dataclass(frozen=True)
class Share:
    """How one parameter is shared between the copies.

    Attributes:
        axis: the axis that is cut; None where every copy keeps all of it.
        copies: into how many pieces.
        padding: zeros at the end of that axis.
    """

    axis: int | None = None
    copies: int = 1
    padding: int = 0

    def spec(self, in_use: PartitionSpec) -> PartitionSpec:
        """The PartitionSpec at rest, from the one that holds while passes run."""
        if self.axis is None:
            return in_use
        axes = [*in_use, *[None] * (self.axis + 1 - len(in_use))]
        before = axes[self.axis] or ()
        axes[self.axis] = (*((before,) if isinstance(before, str) else before), DATA) if before else DATA
        return PartitionSpec(*axes)

    def pad(self, x: jax.Array) -> jax.Array:
        """With the padding: of the whole parameter, or of a device's part of it."""
        if not self.padding:
            return x
        return jnp.pad(x, [(0, self.padding if axis == self.axis else 0) for axis in range(x.ndim)])

    def cut(self, x: jax.Array) -> jax.Array:
        """What :meth:`pad` was given."""
        return lax.slice_in_dim(x, 0, x.shape[self.axis] - self.padding, axis=self.axis) if self.padding else x

    def own(self, x: jax.Array) -> jax.Array:
        """This copy's share, in a ``shard_map``, of what all copies have."""
        if self.axis is None:
            return x
        x = self.pad(x)
        size = x.shape[self.axis] // self.copies
        return lax.dynamic_slice_in_dim(x, lax.axis_index(DATA) * size, size, self.axis)

    def gather(self, x: jax.Array) -> jax.Array:
        """All of it, from every copy's share."""
        return x if self.axis is None else self.cut(lax.all_gather(x, DATA, axis=self.axis, tiled=True))

    def scatter(self, x: jax.Array) -> jax.Array:
        """This copy's share of the sum over all copies."""
        if self.axis is None:
            return lax.psum(x, DATA)
        return lax.psum_scatter(self.pad(x), DATA, scatter_dimension=self.axis, tiled=True)


def share_of(shape: tuple[int, ...], spec: PartitionSpec, sizes: Mapping[str, int], copies: int) -> Share:
    """How a parameter is shared: along the axis that takes the least padding, of equals the first, whose pieces lie
    together in memory. An axis that is split already is not padded.

    Args:
        shape: the whole parameter's.
        spec: how it is split while passes run.
        sizes: of the mesh axes that ``spec`` names.
    """
    if copies == 1:
        return Share()
    found = []
    for axis, size in enumerate(shape):
        names = spec[axis] if axis < len(spec) else None
        for name in (names,) if isinstance(names, str) else names or ():
            size //= sizes[name]
        padding = -size % copies
        if not (padding and names) and padding <= MOST_PADDING * size:
            found.append((padding / size, axis, padding))
    if not found:
        return Share()
    _, axis, padding = min(found)
    return Share(axis, copies, padding)
