"""The mesh axis ``tensor``: what a block needs to run on its part of the weights.

A pair of matrix products is split by columns, then by rows, with no communication in between (arXiv 1909.08053,
section 3). Two functions, each the other's transpose, surround the pair::

    enter(x)   identity           backward: sum over the axis    (every device uses x, so its gradients add up)
    leave(y)   sum over the axis  backward: identity             (every device has a partial y)

They use ``custom_vjp`` because the transpose of ``psum`` would sum a second time where shard_map does not track varying
axes. Between the two, arrays differ between devices; outside, they are replicated.
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
    """Marks the start of device-specific use of a replicated ``x``, which may also be a shared parameter."""
    return x if axis is None else _enter(x, axis)


def leave(y: jax.Array, axis: str | None) -> jax.Array:
    """Sums the devices' partial ``y`` over the axis."""
    return y if axis is None else _leave(y, axis)
