"""Parameters at rest: between steps, every model copy on the mesh axis ``data`` holds one share of each parameter.

A step all-gathers the compute-dtype copy that the passes use, and reduce-scatters the gradients. float32 parameters and
optimizer state are never whole on any device (ZeRO stages 1 and 2, arXiv 1910.02054).

A share is a slice along one axis. If no axis is divisible by the number of copies, one is zero-padded at its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from .mesh import DATA

MOST_PADDING = 1 / 8
"""An axis that would grow by more is not padded. If all would, as in a very short vector, every copy keeps it whole."""


@dataclass(frozen=True)
class Share:
    """How one parameter is sharded between the model copies.

    Attributes:
        axis: the axis that is split; None if the parameter is replicated.
        copies: number of shares.
        padding: number of zeros at the end of the axis.
    """

    axis: int | None = None
    copies: int = 1
    padding: int = 0

    def spec(self, in_use: PartitionSpec) -> PartitionSpec:
        """The PartitionSpec at rest, given the one in use."""
        if self.axis is None:
            return in_use
        axes = [*in_use, *[None] * (self.axis + 1 - len(in_use))]
        before = axes[self.axis] or ()
        axes[self.axis] = (*((before,) if isinstance(before, str) else before), DATA) if before else DATA
        return PartitionSpec(*axes)

    def pad(self, x: jax.Array, xp: Any = jnp) -> jax.Array:
        """Pads the whole parameter, or a device's part of it; a NumPy array with ``xp=np``."""
        if not self.padding:
            return x
        return xp.pad(x, [(0, self.padding if axis == self.axis else 0) for axis in range(x.ndim)])

    def cut(self, x: jax.Array) -> jax.Array:
        """Inverse of :meth:`pad`."""
        return lax.slice_in_dim(x, 0, x.shape[self.axis] - self.padding, axis=self.axis) if self.padding else x

    def own(self, x: jax.Array) -> jax.Array:
        """This copy's share of a replicated parameter; inside ``shard_map``."""
        if self.axis is None:
            return x
        x = self.pad(x)
        size = x.shape[self.axis] // self.copies
        return lax.dynamic_slice_in_dim(x, lax.axis_index(DATA) * size, size, self.axis)

    def gather(self, x: jax.Array) -> jax.Array:
        """All-gathers the shares into the whole parameter."""
        return x if self.axis is None else self.cut(lax.all_gather(x, DATA, axis=self.axis, tiled=True))

    def scatter(self, x: jax.Array) -> jax.Array:
        """Reduce-scatters: this copy's share of the sum over all copies."""
        if self.axis is None:
            return lax.psum(x, DATA)
        return lax.psum_scatter(self.pad(x), DATA, scatter_dimension=self.axis, tiled=True)


def share_of(shape: tuple[int, ...], spec: PartitionSpec, sizes: Mapping[str, int], copies: int) -> Share:
    """How a parameter is sharded: along the axis that needs the least padding. Ties go to the first axis, whose slices
    are contiguous in memory. An axis that is already split is never padded.

    Args:
        shape: shape of the whole parameter.
        spec: its PartitionSpec in use.
        sizes: sizes of the mesh axes in ``spec``.
        copies: number of model copies.
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
