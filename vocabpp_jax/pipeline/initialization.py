"""Sharded initialization: every device draws its own layers and table rows, and nothing else.

Each layer and each table row has its own key (:meth:`.Model.draw_block`, :meth:`.Model.draw_rows`), so a key gives
bitwise identical parameters in every layout. A single program draws one layer on every device and runs once per layer
of a device. Scratch memory is that of one layer, and compile time is independent of the numbers of layers and stages.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .layout import Layout
from .mesh import DATA, PIPE
from .model_interface import Params
from .shares import Share
from .tensor import TENSOR


class Drawing(NamedTuple):
    """The programs that draw a pipeline's parameters.

    Attributes:
        layer: ``(key, layers [p]) -> blocks[chunk][j]``: device d draws layer ``layers[d]``, or zeros if that is
            negative.
        rest: ``key -> parameters`` other than ``blocks``.
    """

    layer: Callable[[jax.Array, np.ndarray], Params]
    rest: Callable[[jax.Array], Params]


def programs(layout: Layout, mesh: Mesh) -> Drawing:
    """The programs for a layout on a mesh, not yet compiled."""
    specs, whole = layout.specs(), PartitionSpec()

    def jitted(draw: Callable, inputs: int, specs: Params) -> Callable:
        draw = jax.shard_map(
            partial(draw, layout), mesh=mesh, in_specs=(whole,) * inputs, out_specs=specs, check_vma=False
        )
        placed = partial(NamedSharding, mesh)
        return jax.jit(draw, out_shardings=jax.tree.map(placed, specs, is_leaf=lambda s: isinstance(s, PartitionSpec)))

    rest = {name: spec for name, spec in specs.items() if name != "blocks"}
    return Drawing(jitted(_layer, 2, specs["blocks"][0][0]), jitted(_rest, 1, rest))


def layers_of(layout: Layout) -> tuple[tuple[np.ndarray, ...], ...]:
    """The ``layers`` argument of :attr:`Drawing.layer` for every ``blocks[chunk][j]``."""
    return tuple(
        tuple(np.array([-1 if n is None else n for n in layers], np.int32) for layers in chunk)
        for chunk in layout.layer_of
    )


def draw(layout: Layout, mesh: Mesh, key: jax.Array) -> Params:
    """Draws the float32 parameters of ``key``, each on the device that holds it."""
    drawing = programs(layout, mesh)
    blocks = tuple(tuple(drawing.layer(key, layers) for layers in chunk) for chunk in layers_of(layout))
    return {"blocks": blocks} | drawing.rest(key)


def _layer(layout: Layout, key: jax.Array, layers: jax.Array) -> Params:
    n = layers[lax.axis_index(PIPE)]
    block = layout.model.draw_block(key, jnp.maximum(n, 0))
    if layout.tensor > 1:
        block = jax.tree.map(partial(_tensor_part, layout.tensor), block, layout.model.tensor.specs)
    block = jax.tree.map(lambda w: jnp.where(n >= 0, w, 0)[None], block)
    return jax.tree.map(Share.own, layout.shares["blocks"][0][0], block)


def _tensor_part(parts: int, whole: jax.Array, spec: PartitionSpec) -> jax.Array:
    """This device's part of a parameter split over the axis ``tensor``."""
    for axis, name in enumerate(spec):
        if name == TENSOR:
            size = whole.shape[axis] // parts
            whole = lax.dynamic_slice_in_dim(whole, lax.axis_index(TENSOR) * size, size, axis)
    return whole


def _rest(layout: Layout, key: jax.Array) -> Params:
    model = layout.model
    rows = {"tokens": model.vocab_size} | ({} if model.positions is None else {"positions": model.positions})
    table = partial(_sharded_table if layout.sharded else _unsharded_table, layout, key)
    params = {"embed": {name: table(name, count) for name, count in rows.items()}, "final": model.draw_final(key)}
    if "head" in layout.shares:
        params["head"] = table("head", model.vocab_size)
    if layout.copied:
        params["ahead"] = {name: _tail_table(layout, key, name, rows[name]) for name in layout.copied}
    if model.tail:
        params["tail"] = tuple(_depth(layout, key, k) for k in range(model.depths))
    at_rest = {"embed", "head"} if layout.sharded else set()  # drawn as shares already
    whole = {name: tree for name, tree in params.items() if name not in at_rest}
    return params | {name: jax.tree.map(Share.own, layout.shares[name], tree) for name, tree in whole.items()}


def _depth(layout: Layout, key: jax.Array, k: int) -> Params:
    """One depth of the tail on the last stage's device, zeros elsewhere."""
    depth = layout.model.draw_depth(key, k)
    if layout.tensor > 1:
        depth = jax.tree.map(partial(_tensor_part, layout.tensor), depth, layout.model.tail.tensor.specs)
    here = lax.axis_index(PIPE) == layout.schedule.placement[-1]
    return jax.tree.map(lambda w: jnp.where(here, w, 0)[None], depth)


def _tail_table(layout: Layout, key: jax.Array, table: str, count: int) -> jax.Array:
    """The tail's copy of an unsharded table: ``[1, count, D]``, zeros except on the last stage's device."""
    here = lax.axis_index(PIPE) == layout.schedule.placement[-1]
    zeros = lambda rows: jnp.zeros((len(rows), layout.model.width))  # noqa: E731
    return lax.cond(here, partial(layout.model.draw_rows, key, table), zeros, jnp.arange(count))[None]


def _sharded_table(layout: Layout, key: jax.Array, table: str, count: int) -> jax.Array:
    """This device's rows, at rest, of a table of ``count`` rows; padding rows are zero."""
    size = layout.padded(count) // (layout.shards * layout.data)
    axes = (*layout.vocabulary_axes, DATA) if layout.data > 1 else layout.vocabulary_axes
    rows = lax.axis_index(axes) * size + jnp.arange(size)
    return jnp.where((rows < count)[:, None], layout.model.draw_rows(key, table, rows), 0)


def _unsharded_table(layout: Layout, key: jax.Array, array: str, count: int) -> jax.Array:
    """An unsharded table: ``[1, count, D]``, zeros on devices that do not hold it.

    If the first and last stage are on different devices, ``tokens`` holds the head on the last stage's device.
    """
    first, last = layout.schedule.placement[0], layout.schedule.placement[-1]
    tables = {last if array == "head" else first: array}
    if array == "tokens" and first != last:
        tables[last] = "tokens" if layout.model.tied else "head"
    choice = np.full(layout.schedule.p, len(tables), np.int32)
    choice[list(tables)] = range(len(tables))
    # A switch, not a select: XLA merges the arithmetic of a select's operands, which changes the last bits.
    draws = [partial(layout.model.draw_rows, key, table) for table in tables.values()]
    zeros = lambda rows: jnp.zeros((len(rows), layout.model.width))  # noqa: E731
    return lax.switch(jnp.asarray(choice)[lax.axis_index(PIPE)], [*draws, zeros], jnp.arange(count))[None]
