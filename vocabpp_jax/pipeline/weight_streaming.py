"""Converts parameters to and from a pipeline's layout one leaf at a time, so no host ever holds the whole model.

A leaf of the canonical tree (see :class:`vocabpp_jax.pipeline.Model`) is identified by its path, such as
``("blocks", 3, "mlp", ...)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.experimental import multihost_utils

from .layout import Layout
from .pipeline import Pipeline

Path = tuple[str | int, ...]
Index = tuple[slice, ...]
Read = Callable[[Path, Index], np.ndarray]


def leaves(tree: Any) -> Iterator[tuple[Path, Any]]:
    """Yields ``(path, leaf)`` for a tree of dictionaries and tuples."""
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield tuple(getattr(k, "key", getattr(k, "idx", None)) for k in keys), leaf


def assemble(pipe: Pipeline, read: Read) -> Any:
    """The pipeline's parameters, with every device's part read separately.

    Args:
        read: ``(path, index) -> array`` returns a slice of a canonical leaf in float32; called per device.
    """
    layout, read = pipe.layout, _read_padded(pipe.layout, read)

    def place(path: Path, shape: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.Array:
        def part(index: Index) -> np.ndarray:
            index = tuple(slice(*i.indices(n)[:2]) for i, n in zip(index, shape.shape, strict=True))
            return _part(layout, path, index, read)

        return jax.make_array_from_callback(shape.shape, sharding, part)

    paths = [path for path, _ in leaves(layout.shapes())]
    flat, tree = jax.tree.flatten(layout.shapes())
    placed = [place(*each) for each in zip(paths, flat, jax.tree.leaves(pipe.shardings), strict=True)]
    return jax.tree.unflatten(tree, placed)


def _part(layout: Layout, path: Path, index: Index, read: Read) -> np.ndarray:
    """One device's part of a leaf in the pipeline's tree."""
    if not _by_device(layout, path):
        return read(path, index)
    origins = [_origin(layout, path, d) for d in range(index[0].start, index[0].stop)]
    shape = tuple(i.stop - i.start for i in index[1:])
    return np.stack([np.zeros(shape, np.float32) if leaf is None else read(leaf, index[1:]) for leaf in origins])


def _read_padded(layout: Layout, read: Read) -> Read:
    """Extends ``read`` with zeros past the ends of a leaf, for the padding of the layout."""
    shapes = {path: leaf.shape for path, leaf in leaves(layout.model.param_shapes())}

    def part(path: Path, index: Index) -> np.ndarray:
        inside = tuple(slice(min(i.start, n), min(i.stop, n)) for i, n in zip(index, shapes[path], strict=True))
        if inside == index:
            return read(path, index)
        found = np.zeros([i.stop - i.start for i in index], np.float32)
        if all(i.start < i.stop for i in inside):
            found[tuple(slice(i.stop - i.start) for i in inside)] = read(path, inside)
        return found

    return part


def _by_device(layout: Layout, path: Path) -> bool:
    """Whether a leaf of the pipeline's tree has a leading device axis."""
    return path[0] in ("blocks", "tail") or (path[0] != "final" and not layout.sharded)


def _origin(layout: Layout, path: Path, d: int) -> Path | None:
    """The canonical leaf that device ``d`` holds in a leaf with a device axis; None if it holds zeros."""
    if path[0] == "blocks":
        _, c, j, *rest = path
        n = layout.layer_of[c][j][d]
        return None if n is None else ("blocks", n, *rest)
    first, last = layout.schedule.placement[0], layout.schedule.placement[-1]
    if path[0] in ("tail", "ahead"):
        origin = path if path[0] == "tail" else ("embed", *path[1:])
        return origin if d == last else None
    if path == ("embed", "tokens") and d == last != first:
        return path if layout.model.tied else ("head",)
    return path if d == (last if path == ("head",) else first) else None


def canonical_leaves(layout: Layout, params: Any) -> Iterator[tuple[Path, np.ndarray]]:
    """Yields the canonical leaves of a pipeline's parameters, each whole and on every process's host. A tail's leaves
    come last."""
    packed = dict(leaves(params))
    places = {}
    for path in packed:
        if _by_device(layout, path):
            for d in range(layout.schedule.p):
                if (origin := _origin(layout, path, d)) is not None:
                    places.setdefault(origin, (path, d))
    for path, leaf in leaves(layout.model.param_shapes()):
        packed_path, d = places.get(path, (path, None))
        whole = _on_host(packed[packed_path] if d is None else _device_slice(packed[packed_path], d))
        yield path, whole[tuple(map(slice, leaf.shape))]


@jax.jit
def _device_slice(leaf: jax.Array, d: int) -> jax.Array:
    return lax.dynamic_index_in_dim(leaf, d, keepdims=False)


def _on_host(x: jax.Array) -> np.ndarray:
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))
