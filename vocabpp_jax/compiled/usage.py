"""How much device memory the training state takes, and how much of its allocation each device uses."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding

from ..pipeline.pipeline import Pipeline
from ..training import shardings


class StateBytes(NamedTuple):
    """Bytes per device of the training state.

    Float32 parameters and optimizer state as stored between steps, accumulated gradients, and the copies of the
    parameters that passes read: cast to the compute dtype, or gathered over the data axis. Without a cast or a gather,
    the copies take 0.
    """

    parameters: int
    optimizer: int
    gradients: int
    rounded: int


def state_bytes(pipe: Pipeline, optimizer: optax.GradientTransformation) -> StateBytes:
    """Bytes that a device allocates for the training state."""
    layout, placed = pipe.layout, shardings(pipe, optimizer)
    params, in_use = layout.shapes(), layout.shapes_in_use()
    copies = jax.tree.map(
        lambda w, r, share: None if share.axis is None and w.dtype == r.dtype else r,
        in_use,
        jax.eval_shape(pipe.rounded, in_use),
        layout.shares,
    )
    where = jax.tree.map(partial(NamedSharding, pipe.mesh), layout.specs_in_use())
    return StateBytes(
        _bytes(params, placed.params),
        _bytes(jax.eval_shape(optimizer.init, params), placed.optimizer),
        _bytes(in_use, where),
        _bytes(copies, where),
    )


def used_parameters(pipe: Pipeline) -> tuple[int, ...]:
    """Parameters that each device actually uses. One program runs everywhere, so each allocates the fullest's."""
    layout, p = pipe.layout, pipe.schedule.p
    shapes = layout.shapes_in_use()
    counts = np.zeros(p, int)
    for chunk, layers in enumerate(layout.layer_of):
        for j, of_device in enumerate(layers):
            size = sum(x.size for x in jax.tree.leaves(shapes["blocks"][chunk][j])) // p
            counts += size * np.array([n is not None for n in of_device])
    counts += sum(x.size for x in jax.tree.leaves(shapes["final"]))
    tables = shapes["embed"] | ({"head": shapes["head"]} if "head" in shapes else {})
    first, last = pipe.schedule.placement[0], pipe.schedule.placement[-1]
    counts[last] += sum(x.size for x in jax.tree.leaves([shapes.get("tail"), shapes.get("ahead")])) // p
    for name, table in tables.items():
        if layout.sharded:
            counts += table.size // p
            continue
        holders = {"tokens": {first} | ({last} if layout.head_is_embedding else set()), "head": {last}}
        for device in holders.get(name, {first}):
            counts[device] += table.size // p
    return tuple(counts.tolist())


def used_bytes(pipe: Pipeline, batch: int, length: int, bytes_a_parameter: float) -> tuple[int, ...]:
    """Bytes that each device actually fills: the state of its own parameters and the ring cells it writes.

    ``batch`` is sequences per device; ``bytes_a_parameter`` is the average per parameter over weights, gradient,
    moments and their copies in the compute dtype.
    """
    buffers, program = pipe.buffer_bytes(batch, length), pipe.program
    total = np.array(used_parameters(pipe)) * bytes_a_parameter
    for ring, cells in program.rings.items():
        total += np.array(program.peaks[ring]) * (buffers.get(ring, 0) / cells)
    return tuple(int(n) for n in total)


def _bytes(shapes: Any, placed: Any) -> int:
    def on_a_device(x: jax.ShapeDtypeStruct | None, sharding: NamedSharding) -> int:
        if x is None:
            return 0
        return int(np.prod(sharding.shard_shape(x.shape), dtype=np.int64)) * x.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(on_a_device, shapes, placed, is_leaf=lambda x: x is None)))
