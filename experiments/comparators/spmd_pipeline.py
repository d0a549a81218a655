"""A pipeline by autodiff, as SPMD frameworks such as MaxText build it.

All devices run the same layers on a stream that moves on by one stage per iteration, for m + p - 1 iterations, whether
or not a microbatch has arrived; differentiating the loop gives the backward, after all forwards. Embedding and head are
hoisted out of the loop: every device holds both, embeds, and computes the loss of its share of the microbatches.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from vocabpp_jax.pipeline.mesh import PIPE
from vocabpp_jax.pipeline.model_interface import Params

from .contender import Batch, OnPipe, embedded, head_loss


@dataclass(frozen=True)
class SPMDPipeline(OnPipe):
    """The pipeline over ``pipe`` with the head outside; the batch is sharded over ``pipe``."""

    batch_spec = PartitionSpec()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.layers % self.p:
            raise ValueError(f"layers is {self.model.layers}; spmd-pipeline needs a multiple of {self.p} devices")

    @property
    def per_stage(self) -> int:
        """Layers per stage."""
        return self.model.layers // self.p

    def pack(self, canonical: Params) -> Params:
        """The j-th layers of all stages, stacked: ``[p, ...]``."""
        blocks = canonical["blocks"]
        stacked = tuple(
            jax.tree.map(lambda *ws: jnp.stack(ws), *(blocks[d * self.per_stage + j] for d in range(self.p)))
            for j in range(self.per_stage)
        )
        return canonical | {"blocks": stacked}

    def unpack(self, packed: Params) -> Params:
        blocks = tuple(
            jax.tree.map(lambda w, d=d: w[d], packed["blocks"][j]) for d in range(self.p) for j in range(self.per_stage)
        )
        return packed | {"blocks": blocks}

    def specs(self) -> Params:
        shapes = jax.eval_shape(self.pack, self.model.param_shapes())
        return {
            key: jax.tree.map(lambda _, k=key: PartitionSpec(PIPE) if k == "blocks" else PartitionSpec(), branch)
            for key, branch in shapes.items()
        }

    def value_and_grad(self, params: Params, batch: Batch) -> tuple[jax.Array, Params]:
        run = jax.shard_map(
            self._loss, mesh=self.mesh, in_specs=(self.specs(), self.batch_spec), out_specs=PartitionSpec()
        )
        return jax.value_and_grad(run)(params, batch)

    def _loss(self, params: Params, batch: Batch) -> jax.Array:
        """On one device: the loop over the stages' layers, then this device's share of the head."""
        count = batch["tokens"].size
        params = self.cast(params)
        blocks = jax.tree.map(lambda w: w[0], params.pop("blocks"))
        # Device-local from here on, so that their gradients are summed over the devices once, not in every iteration.
        params = jax.tree.map(lambda w: lax.pcast(w, (PIPE,), to="varying"), params)
        stage, p = lax.axis_index(PIPE), self.p

        def move(x: jax.Array, entering: jax.Array) -> tuple[jax.Array, jax.Array]:
            x = jnp.where(stage == 0, entering, x)
            for block in blocks:
                x = self.model.block(block, x, {})
            return lax.ppermute(x, PIPE, [(d, (d + 1) % p) for d in range(p)]), x

        _, B, L = batch["tokens"].shape
        nothing = lax.pcast(jnp.zeros((B, L, self.model.width), self.compute_dtype), (PIPE,), to="varying")
        # All at once, so that the embedding gradient is computed once and not in every iteration.
        fed = jax.vmap(lambda tokens: embedded(self.model, params, tokens))(batch["tokens"])
        _, streams = lax.scan(move, nothing, jnp.pad(fed, ((0, p - 1), (0, 0), (0, 0), (0, 0))))
        last = jnp.where(stage == p - 1, streams[p - 1 :], 0)
        share = lax.psum_scatter(last, PIPE, scatter_dimension=0, tiled=True)
        labels = lax.dynamic_slice_in_dim(batch["labels"], stage * (self.m // p), self.m // p)

        def head(total: jax.Array, one: tuple) -> tuple[jax.Array, None]:
            return total + head_loss(self.model, params, *one), None

        zero = lax.pcast(jnp.zeros((), jnp.float32), (PIPE,), to="varying")
        total, _ = lax.scan(head, zero, (share, labels))
        return lax.psum(total, PIPE) / count
