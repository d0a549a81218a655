"""Communication between vocabulary shards: native collectives of the backend, or trees of permutes.

The vocabulary layers need a broadcast from one stage, a sum read by one stage, and a small gather. On CPUs XLA has no
broadcast, and sums and gathers between processes take gloo many sequential messages. Built from permutes, a broadcast
and a sum take ceil(log2 p) rounds, each moving an array once, and a gather takes as many rounds (the concatenation of
Bruck et al., "Efficient algorithms for all-to-all communications in multiport message-passing systems", 1997). Along
the axis ``tensor`` native collectives are always used.

Shapes are per device; K is the number of shards. ``source`` and ``target`` are indices on the mesh axis ``pipe``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from .mesh import GPU_PLATFORMS, PIPE


@dataclass(frozen=True)
class Native:
    """Collectives of the backend.

    Attributes:
        axes: the mesh axes over which the vocabulary is sharded, ``pipe`` first.
    """

    axes: tuple[str, ...]

    def broadcast(self, x: jax.Array, source: int) -> jax.Array:
        """The source's ``x`` on all devices of the axis ``pipe``."""
        return lax.pbroadcast(x, (PIPE,), source)

    def total(self, x: jax.Array, target: int, also: int | None = None) -> jax.Array:
        """The sum of ``x`` over all shards; only valid on device ``target`` and, if given, ``also``."""
        return lax.psum(x, self.axes)

    def gather(self, x: jax.Array) -> jax.Array:
        """Every shard's ``x``, ``[K, ...]``."""
        return lax.all_gather(x, self.axes)


@dataclass(frozen=True)
class PermuteTree:
    """The same collectives built from permutes. On devices that do not read a sum, its result is undefined.

    Attributes:
        axes: the mesh axes over which the vocabulary is sharded, ``pipe`` first. Permutes run along ``pipe``.
        p: the size of the axis ``pipe``.
    """

    axes: tuple[str, ...]
    p: int

    def broadcast(self, x: jax.Array, source: int) -> jax.Array:
        """See :meth:`Native.broadcast`."""
        distance = (lax.axis_index(PIPE) - source) % self.p
        for reached, more in self._rounds():
            arrived = lax.ppermute(x, PIPE, [self._pair(source, n, n + reached) for n in range(more)])
            x = jnp.where((distance >= reached) & (distance < 2 * reached), arrived, x)
        return x

    def total(self, x: jax.Array, target: int, also: int | None = None) -> jax.Array:
        """See :meth:`Native.total`."""
        x = lax.psum(x, self.axes[1:]) if self.axes[1:] else x
        # Devices that receive nothing get zeros.
        for reached, more in reversed(list(self._rounds())):
            x += lax.ppermute(x, PIPE, [self._pair(target, n + reached, n) for n in range(more)])
        if also in (None, target):
            return x
        return jnp.where(lax.axis_index(PIPE) == also, lax.ppermute(x, PIPE, [(target, also)]), x)

    def gather(self, x: jax.Array) -> jax.Array:
        """See :meth:`Native.gather`."""
        here = lax.all_gather(x, self.axes[1:]) if self.axes[1:] else x[None]
        gathered = here[None]  # entry n comes from the device n places ahead
        for reached, more in self._rounds():
            pairs = [self._pair(device, reached, 0) for device in range(self.p)]
            gathered = jnp.concatenate([gathered, lax.ppermute(gathered[:more], PIPE, pairs)])
        return jnp.roll(gathered, lax.axis_index(PIPE), axis=0).reshape(-1, *x.shape)

    def _rounds(self) -> Iterator[tuple[int, int]]:
        """For each round, how many devices are reached before it, and how many more it reaches."""
        reached = 1
        while reached < self.p:
            yield reached, min(reached, self.p - reached)
            reached *= 2

    def _pair(self, origin: int, source: int, target: int) -> tuple[int, int]:
        return (origin + source) % self.p, (origin + target) % self.p


def collectives(axes: tuple[str, ...], p: int, platform: str) -> Native | PermuteTree:
    """:class:`Native` on GPUs, :class:`PermuteTree` elsewhere."""
    return Native(axes) if platform in GPU_PLATFORMS else PermuteTree(axes, p)
