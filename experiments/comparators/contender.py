"""What every program that is timed has in common: parameters and a batch in, loss and gradients out.

Shapes: m microbatches, B sequences in each, L length, D model width, V vocabulary, N = B·L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from vocabpp_jax import Pipeline
from vocabpp_jax.layout import PIPE
from vocabpp_jax.model import Model, Params

Batch = dict[str, jax.Array]


class Contender(Protocol):
    """One way to compute a loss and its gradients on the devices of a mesh."""

    mesh: Mesh
    batch_spec: PartitionSpec
    """How ``[m, B, L]`` lies on the mesh."""

    def pack(self, canonical: Params) -> Params:
        """Canonical parameters in this contender's layout."""

    def specs(self) -> Params:
        """The PartitionSpec of every parameter."""

    def value_and_grad(self, params: Params, batch: Batch) -> tuple[jax.Array, Params]:
        """The mean loss, and float32 gradients laid out as the parameters are."""

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
    """The fields of a comparator, which uses the mesh's axis ``pipe`` for whatever it does."""

    model: Model
    mesh: Mesh
    m: int
    compute_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.m % self.p:
            raise ValueError(f"microbatches is {self.m}; {type(self).__name__} shares them out over {self.p} devices")

    @property
    def p(self) -> int:
        """Devices."""
        return self.mesh.shape[PIPE]

    def cast(self, params: Params) -> Params:
        """Parameters in the compute dtype."""
        return jax.tree.map(lambda w: w.astype(self.compute_dtype), params)


def embedded(model: Model, params: Params, tokens: jax.Array) -> jax.Array:
    """The stream that enters the first block ``[B, L, D]``."""
    x = params["embed"]["tokens"][tokens] * jnp.asarray(model.embed_scale, params["embed"]["tokens"].dtype)
    return x if model.positions is None else x + params["embed"]["positions"][: tokens.shape[1]]


def head_loss(model: Model, params: Params, x: jax.Array, labels: jax.Array) -> jax.Array:
    """The sum of the cross entropies of ``x [B, L, D]`` behind the last block, float32."""
    table = params["embed"]["tokens"] if model.tied else params["head"]
    x = model.final(params["final"], x).reshape(-1, model.width)
    logits = jnp.einsum("ND,VD->NV", x, table, preferred_element_type=jnp.float32)
    # By a mask and not by indices, whose transpose is a scatter into zeros of this size.
    hot = labels.reshape(-1, 1) == jax.lax.broadcasted_iota(jnp.int32, (1, logits.shape[1]), 1)
    return jnp.sum(jax.nn.logsumexp(logits, axis=1) - jnp.sum(jnp.where(hot, logits, 0), axis=1))


def accumulated(model: Model, params: Params, batch: Batch, tokens: int, dtype: str) -> tuple[jax.Array, Params]:
    """A plain gradient-accumulation step: microbatches one after the other, autodiff through the whole model.

    Returns the loss and the float32 gradients, over ``tokens`` tokens.
    """

    def loss(params: Params, one: Batch) -> jax.Array:
        params = jax.tree.map(lambda w: w.astype(dtype), params)
        x = embedded(model, params, one["tokens"])
        for block in params["blocks"]:
            x = model.block(block, x, {})
        return head_loss(model, params, x, one["labels"]) / tokens

    def add(total: tuple, one: Batch) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, one)), None

    zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(add, zero, batch)[0]
