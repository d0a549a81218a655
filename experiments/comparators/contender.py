"""The common interface of all timed programs: parameters and a batch in, loss and gradients out.

Shapes: m microbatches, B sequences in each, L length, D model width, V vocabulary, N = B·L tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from vocabpp_jax import Pipeline
from vocabpp_jax.pipeline.mesh import PIPE
from vocabpp_jax.pipeline.model_interface import Model, Params

Batch = dict[str, jax.Array]


class Contender(Protocol):
    """One way to compute a loss and its gradients on the devices of a mesh."""

    mesh: Mesh
    batch_spec: PartitionSpec
    """How ``[m, B, L]`` is sharded over the mesh."""

    def pack(self, canonical: Params) -> Params:
        """Canonical parameters in this contender's layout."""

    def specs(self) -> Params:
        """The PartitionSpec of every parameter."""

    def value_and_grad(self, params: Params, batch: Batch) -> tuple[jax.Array, Params]:
        """The mean loss, and float32 gradients in the layout of the parameters."""

    def unpack(self, packed: Params) -> Params:
        """Parameters or gradients as the canonical tree."""


@dataclass(frozen=True)
class Ours:
    """This project's pipeline."""

    pipe: Pipeline

    @property
    def mesh(self) -> Mesh:
        return self.pipe.mesh

    @property
    def batch_spec(self) -> PartitionSpec:
        return PartitionSpec(None, "data")

    def pack(self, canonical: Params) -> Params:
        return self.pipe.layout.pack(canonical)

    def specs(self) -> Params:
        return self.pipe.layout.specs()

    def value_and_grad(self, params: Params, batch: Batch) -> tuple[jax.Array, Params]:
        return self.pipe.value_and_grad(params, batch)

    def unpack(self, packed: Params) -> Params:
        return self.pipe.layout.unpack(packed)


@dataclass(frozen=True)
class OnPipe:
    """The fields of a comparator, all of which use only the mesh axis ``pipe``."""

    model: Model
    mesh: Mesh
    m: int
    compute_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.m % self.p:
            raise ValueError(f"microbatches is {self.m}; {type(self).__name__} shares them out over {self.p} devices")

    @property
    def p(self) -> int:
        """Number of devices."""
        return self.mesh.shape[PIPE]

    def cast(self, params: Params) -> Params:
        """Parameters in the compute dtype."""
        return jax.tree.map(lambda w: w.astype(self.compute_dtype), params)


def embedded(model: Model, params: Params, tokens: jax.Array) -> jax.Array:
    """The stream that enters the first block ``[B, L, D]``."""
    x = params["embed"]["tokens"][tokens] * jnp.asarray(model.embed_scale, params["embed"]["tokens"].dtype)
    return x if model.positions is None else x + params["embed"]["positions"][: tokens.shape[1]]


def head_loss(model: Model, params: Params, x: jax.Array, labels: jax.Array) -> jax.Array:
    """The summed cross-entropy of ``x [B, L, D]`` from the last block, float32."""
    table = params["embed"]["tokens"] if model.tied else params["head"]
    x = model.final(params["final"], x).reshape(-1, model.width)
    logits = jnp.einsum("ND,VD->NV", x, table, preferred_element_type=jnp.float32)
    # By a mask and not by indexing, whose transpose is a scatter into zeros of this size.
    hot = labels.reshape(-1, 1) == jax.lax.broadcasted_iota(jnp.int32, (1, logits.shape[1]), 1)
    return jnp.sum(jax.nn.logsumexp(logits, axis=1) - jnp.sum(jnp.where(hot, logits, 0), axis=1))


def accumulated(
    model: Model,
    params: Params,
    batch: Batch,
    tokens: int,
    dtype: str,
    whole: Callable[[Params], Params] = lambda params: params,
) -> tuple[jax.Array, Params]:
    """A plain gradient-accumulation step: microbatches one after the other, autodiff through blocks and head.

    The embedding gradient is added to the rows that were looked up: autodiff would create a table of zeros for it.
    ``whole`` turns sharded parameters into whole ones. Returns the loss and the float32 gradients, both divided by
    ``tokens``.
    """

    def loss(params: Params, x: jax.Array, labels: jax.Array) -> jax.Array:
        params = jax.tree.map(lambda w: w.astype(dtype), whole(params))
        for block in params["blocks"]:
            x = model.block(block, x, {})
        return head_loss(model, params, x, labels) / tokens

    def add(total: tuple, one: Batch) -> tuple[tuple, None]:
        x = embedded(model, params, one["tokens"]).astype(dtype)
        value, (grads, dx) = jax.value_and_grad(loss, (0, 1))(params, x, one["labels"])
        summed, grads = jax.tree.map(jnp.add, total, (value, grads))
        return (summed, grads | {"embed": _looked_up(model, grads["embed"], one["tokens"], dx)}), None

    zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(add, zero, batch)[0]


def _looked_up(model: Model, total: Params, tokens: jax.Array, dx: jax.Array) -> Params:
    """The embedding gradient plus that of a stream ``dx [B, L, D]`` that was looked up in it."""
    dx = dx.astype(jnp.float32)
    added = {"tokens": total["tokens"].at[tokens].add(dx * model.embed_scale)}
    if model.positions is not None:
        added["positions"] = total["positions"].at[: tokens.shape[1]].add(dx.sum(0))
    return total | added
