"""How the vocabulary's shards communicate: by the backend's own collectives, or by trees of permutes.

The layers need a broadcast from one stage, a sum that one stage reads, and a small gather. XLA has no broadcast on
CPUs, and sums and gathers between processes take gloo many messages one after the other. Of permutes a broadcast and a
sum take ceil(log2 p) rounds in which every array moves once, and a gather as many rounds (the concatenation of Bruck et
al., "Efficient algorithms for all-to-all communications in multiport message-passing systems", 1997). Along the axis
``tensor`` the backend's own are used either way.

Shapes are per device. ``source`` and ``target`` are indices on the mesh axis ``pipe``.
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
    """What the backend has.

    Attributes:
        axes: the mesh axes that shard the vocabulary, ``pipe`` first.
    """

    axes: tuple[str, ...]

    def broadcast(self, x: jax.Array, source: int) -> jax.Array:
        """The source's ``x``, on all devices of the axis ``pipe``."""
        return lax.pbroadcast(x, (PIPE,), source)

    def total(self, x: jax.Array, target: int, also: int | None = None) -> jax.Array:
        """The sum of ``x`` over all shards, for the target to read, and another device where one is named."""
        return lax.psum(x, self.axes)

    def gather(self, x: jax.Array) -> jax.Array:
        """The ``x`` of every shard, ``[shards, ...]``."""
        return lax.all_gather(x, self.axes)


@dataclass(frozen=True)
class PermuteTree:
    """The same, made of permutes. What a sum leaves where it is not read means nothing.

    Attributes:
        axes: the mesh axes that shard the vocabulary, ``pipe`` first; permutes are for this one.
        p: its size.
    """

    axes: tuple[str, ...]
    p: int

    def broadcast(self, x: jax.Array, source: int) -> jax.Array:
        """As :meth:`Native.broadcast`."""
        behind = (lax.axis_index(PIPE) - source) % self.p
        for reached, more in self._rounds():
            arrived = lax.ppermute(x, PIPE, [self._pair(source, n, n + reached) for n in range(more)])
            x = jnp.where((behind >= reached) & (behind < 2 * reached), arrived, x)
        return x

    def total(self, x: jax.Array, target: int, also: int | None = None) -> jax.Array:
        """As :meth:`Native.total`."""
        x = lax.psum(x, self.axes[1:]) if self.axes[1:] else x
        # A device to which nothing is sent receives zeros.
        for reached, more in reversed(list(self._rounds())):
            x += lax.ppermute(x, PIPE, [self._pair(target, n + reached, n) for n in range(more)])
        if also in (None, target):
            return x
        return jnp.where(lax.axis_index(PIPE) == also, lax.ppermute(x, PIPE, [(target, also)]), x)

    def gather(self, x: jax.Array) -> jax.Array:
        """As :meth:`Native.gather`."""
        here = lax.all_gather(x, self.axes[1:]) if self.axes[1:] else x[None]
        found = here[None]  # entry n comes from the device n places further on
        for reached, more in self._rounds():
            pairs = [self._pair(device, reached, 0) for device in range(self.p)]
            found = jnp.concatenate([found, lax.ppermute(found[:more], PIPE, pairs)])
        return jnp.roll(found, lax.axis_index(PIPE), axis=0).reshape(-1, *x.shape)

    def _rounds(self) -> Iterator[tuple[int, int]]:
        """The devices that are reached before a round, and how many more it reaches."""
        reached = 1
        while reached < self.p:
            yield reached, min(reached, self.p - reached)
            reached *= 2

    def _pair(self, origin: int, source: int, target: int) -> tuple[int, int]:
        return (origin + source) % self.p, (origin + target) % self.p


def collectives(axes: tuple[str, ...], p: int, platform: str) -> Native | PermuteTree:
    """:class:`Native` on GPUs, :class:`PermuteTree` elsewhere."""
    return Native(axes) if platform in GPU_PLATFORMS else PermuteTree(axes, p)
