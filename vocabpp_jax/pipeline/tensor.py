"""The mesh axis ``tensor``: what a block needs to run on its part of the weights.

A pair of matrix products is split by columns, then by rows, with nothing exchanged between them
(arXiv 1909.08053, section 3). Around the pair are two functions, each the other's transpose::

    enter(x)   x as it is     backward: the sum over the axis    (every device uses x: its gradients add)
    leave(y)   the sum        backward: the gradient as it is    (every device has a part of y)

They are written with ``custom_vjp`` because the transpose of ``psum`` would sum once more where shard_map does not
track what varies over an axis. Between them arrays differ from device to device; outside they are equal on all.
"""

from __future__ import annotations

from functools import partial

import jax
from jax import lax

TENSOR = "tensor"


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _enter(x: jax.Array, axis: str) -> jax.Array:
    return x


_enter.defvjp(lambda x, axis: (x, None), lambda axis, _, g: (lax.psum(g, axis),))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _leave(y: jax.Array, axis: str) -> jax.Array:
    return lax.psum(y, axis)


_leave.defvjp(lambda y, axis: (lax.psum(y, axis), None), lambda axis, _, g: (g,))


def enter(x: jax.Array, axis: str | None) -> jax.Array:
    """``x``, about to be used by every device of the axis in its own way; also a parameter that all of them share."""
    return x if axis is None else _enter(x, axis)


def leave(y: jax.Array, axis: str | None) -> jax.Array:
    """The sum of every device's part of ``y``."""
    return y if axis is None else _leave(y, axis)
