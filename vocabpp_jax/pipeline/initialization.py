"""Drawing a model's parameters where they live: every device draws its own layers and rows, and nothing else.

Each layer and each row of a table has a key of its own (:meth:`.Model.draw_block`, :meth:`.Model.draw_rows`), so the
parameters of a key are the same, to the bit, in every layout. One program draws a layer on every device;
running it once for each of a device's layers takes the scratch space of one layer, and the time to compile grows
neither with the layers nor with the stages.
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
    """The compiled programs that draw a pipeline's parameters.

    Attributes:
        layer: ``(key, layers [p]) -> blocks[chunk][j]``: device d draws the layer ``layers[d]``, or zeros where that is
            negative.
        rest: ``key -> parameters`` without ``blocks``.
    """

    layer: Callable[[jax.Array, np.ndarray], Params]
    rest: Callable[[jax.Array], Params]


def programs(layout: Layout, mesh: Mesh) -> Drawing:
    """The programs for a layout on a mesh, not compiled yet."""
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
    """What :attr:`Drawing.layer` takes for every ``blocks[chunk][j]``."""
    return tuple(
        tuple(np.array([-1 if n is None else n for n in layers], np.int32) for layers in chunk)
        for chunk in layout.layer_of
    )


def draw(layout: Layout, mesh: Mesh, key: jax.Array) -> Params:
    """The parameters of ``key``, float32, each drawn where it lives."""
    drawing = programs(layout, mesh)
    blocks = tuple(tuple(drawing.layer(key, layers) for layers in chunk) for chunk in layers_of(layout))
    return {"blocks": blocks} | drawing.rest(key)


def _layer(layout: Layout, key: jax.Array, layers: jax.Array) -> Params:
    n = layers[lax.axis_index(PIPE)]
    block = layout.model.draw_block(key, jnp.maximum(n, 0))
    if layout.tensor > 1:
        block = jax.tree.map(partial(_part, layout.tensor), block, layout.model.tensor.specs)
    block = jax.tree.map(lambda w: jnp.where(n >= 0, w, 0)[None], block)
    return jax.tree.map(Share.own, layout.shares["blocks"][0][0], block)


def _part(parts: int, whole: jax.Array, spec: PartitionSpec) -> jax.Array:
    """This device's part of a parameter that is split over the axis ``tensor``."""
    for axis, name in enumerate(spec):
        if name == TENSOR:
            size = whole.shape[axis] // parts
            whole = lax.dynamic_slice_in_dim(whole, lax.axis_index(TENSOR) * size, size, axis)
    return whole


def _rest(layout: Layout, key: jax.Array) -> Params:
    model = layout.model
    rows = {"tokens": model.vocab_size} | ({} if model.positions is None else {"positions": model.positions})
    table = partial(_shard if layout.sharded else _whole, layout, key)
    params = {"embed": {name: table(name, count) for name, count in rows.items()}, "final": model.draw_final(key)}
    if "head" in layout.shares:
        params["head"] = table("head", model.vocab_size)
    if layout.copied:
        params["ahead"] = {name: _copy(layout, key, name, rows[name]) for name in layout.copied}
    if model.tail:
        params["tail"] = tuple(_depth(layout, key, k) for k in range(model.depths))
    drawn_so = {"embed", "head"} if layout.sharded else set()
    whole = {name: tree for name, tree in params.items() if name not in drawn_so}
    return params | {name: jax.tree.map(Share.own, layout.shares[name], tree) for name, tree in whole.items()}


def _depth(layout: Layout, key: jax.Array, k: int) -> Params:
    """One depth of the tail on the last stage's device, zeros on the others."""
    depth = layout.model.draw_depth(key, k)
    if layout.tensor > 1:
        depth = jax.tree.map(partial(_part, layout.tensor), depth, layout.model.tail.tensor.specs)
    here = lax.axis_index(PIPE) == layout.schedule.placement[-1]
    return jax.tree.map(lambda w: jnp.where(here, w, 0)[None], depth)


def _copy(layout: Layout, key: jax.Array, table: str, count: int) -> jax.Array:
    """An unsharded table on the last stage's device, zeros on the others: ``[1, count, D]``."""
    here = lax.axis_index(PIPE) == layout.schedule.placement[-1]
    zeros = lambda rows: jnp.zeros((len(rows), layout.model.width))  # noqa: E731
    return lax.cond(here, partial(layout.model.draw_rows, key, table), zeros, jnp.arange(count))[None]


def _shard(layout: Layout, key: jax.Array, table: str, count: int) -> jax.Array:
    """This device's rows at rest of a table of ``count`` rows, zeros where they are padding."""
    size = layout.padded(count) // (layout.shards * layout.data)
    axes = (*layout.vocabulary_axes, DATA) if layout.data > 1 else layout.vocabulary_axes
    rows = lax.axis_index(axes) * size + jnp.arange(size)
    return jnp.where((rows < count)[:, None], layout.model.draw_rows(key, table, rows), 0)


def _whole(layout: Layout, key: jax.Array, array: str, count: int) -> jax.Array:
    """An unsharded table on the device that has it, zeros on the others: ``[1, count, D]``.

    Where first and last stage are on different devices, ``tokens`` holds the head on the last one's.
    """
    first, last = layout.schedule.placement[0], layout.schedule.placement[-1]
    tables = {last if array == "head" else first: array}
    if array == "tokens" and first != last:
        tables[last] = "tokens" if layout.model.tied else "head"
    choice = np.full(layout.schedule.p, len(tables), np.int32)
    choice[list(tables)] = range(len(tables))
    # Branches, not selections: of those XLA merges the arithmetic, which changes the last bits.
    draws = [partial(layout.model.draw_rows, key, table) for table in tables.values()]
    zeros = lambda rows: jnp.zeros((len(rows), layout.model.width))  # noqa: E731
    return lax.switch(jnp.asarray(choice)[lax.axis_index(PIPE)], [*draws, zeros], jnp.arange(count))[None]
