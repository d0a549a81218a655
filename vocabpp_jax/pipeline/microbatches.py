"""Validates a batch, and splits it into microbatches."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..vocab import counted, refuse_outside
from .mesh import DATA
from .model_interface import Model

Batch = dict[str, Any]


def checked(batch: Batch, m: int, data: int, model: Model) -> Batch:
    """The batch as ``[m, B, L]``, with a float32 mask that is 0 for labels of -100.

    Raises:
        ValueError: an array is missing or has the wrong shape or dtype, or ids are outside the vocabulary.
    """
    if missing := {"tokens", "labels"} - set(batch):
        raise ValueError(f"the batch has {sorted(batch)}; it needs {', '.join(sorted(missing))} too")
    shape = jnp.shape(batch["tokens"])
    whole = len(shape) == 2 and shape[0] % (m * data) == 0
    if not whole and (len(shape) != 3 or shape[0] != m or shape[1] % data):
        raise ValueError(
            f"tokens has shape {list(shape)}; it must be [m={m}, a multiple of {data}, length] or "
            f"[a multiple of {m * data}, length]"
        )
    for name in ("labels", "mask"):
        if name in batch and jnp.shape(batch[name]) != shape:
            raise ValueError(f"{name} has shape {list(jnp.shape(batch[name]))}; tokens has {list(shape)}")
    if whole:
        batch = jax.tree.map(lambda array: in_microbatches(array, m, data), batch)
        shape = jnp.shape(batch["tokens"])
    if model.positions is not None and shape[2] > model.positions:
        raise ValueError(f"tokens has length {shape[2]}; the model has {model.positions} positions")
    if shape[2] <= model.depths:
        raise ValueError(f"tokens has length {shape[2]}; predicting {model.depths} further tokens takes a longer one")
    mask = batch.get("mask")
    mask = jnp.ones(shape, jnp.float32) if mask is None else jnp.asarray(mask).astype(jnp.float32)
    for name in ("tokens", "labels"):
        if not jnp.issubdtype(kind := jnp.result_type(batch[name]), jnp.integer):
            raise ValueError(f"{name} has dtype {kind}; token ids are integers")
    refuse_outside(batch["tokens"], batch["labels"], mask, model.vocab_size)
    tokens, labels = (jnp.asarray(batch[name]).astype(jnp.int32) for name in ("tokens", "labels"))
    labels, mask = counted(tokens, labels, mask, model.vocab_size)
    return {"tokens": tokens, "labels": labels, "mask": mask, "aux_inputs": batch.get("aux_inputs", {})}


def in_microbatches(array: jax.Array, m: int, data: int) -> jax.Array:
    """``[batch, ...] -> [m, batch / m, ...]``; every row stays on its part of the data axis."""
    shape = jnp.shape(array)
    parts = jnp.reshape(jnp.asarray(array), (data, m, shape[0] // (data * m), *shape[1:]))
    return jnp.swapaxes(parts, 0, 1).reshape(m, shape[0] // m, *shape[1:])


def global_batch(local: Batch, mesh: Mesh) -> Batch:
    """Global arrays ``[batch, ...]`` sharded over the data axis, from each process's rows ``[rows, ...]``."""
    sharding = NamedSharding(mesh, PartitionSpec(DATA))
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(sharding, np.asarray(array)), local)
