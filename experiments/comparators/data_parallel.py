"""The same devices used as copies of the whole model, each with its share of the microbatches."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vocabpp_jax.pipeline.mesh import PIPE
from vocabpp_jax.pipeline.model_interface import Params

from .contender import Batch, OnPipe, accumulated


@dataclass(frozen=True)
class Separate(OnPipe):
    """Every device computes its share of the microbatches alone, without communication or waiting: the same work
    divided evenly.

    Its time is the ideal. It returns one loss and one gradient per device; their sums are the correct values.
    """

    batch_spec = PartitionSpec(PIPE)

    def pack(self, canonical: Params) -> Params:
        return canonical

    def specs(self) -> Params:
        return jax.tree.map(lambda _: PartitionSpec(), self.model.param_shapes())

    def value_and_grad(self, params: Params, batch: Batch) -> tuple[jax.Array, Params]:
        def on_device(params: Params, batch: Batch) -> tuple[jax.Array, Params]:
            out = accumulated(self.model, params, batch, batch["tokens"].size * self.p, self.compute_dtype)
            return self.reduced(out)

        run = jax.shard_map(
            on_device,
            mesh=self.mesh,
            in_specs=(PartitionSpec(), self.batch_spec),
            out_specs=self.out_spec,
            check_vma=False,
        )
        return run(params, batch)

    @property
    def out_spec(self) -> PartitionSpec:
        return PartitionSpec(PIPE)

    def reduced(self, out: tuple[jax.Array, Params]) -> tuple[jax.Array, Params]:
        """What a device returns."""
        return jax.tree.map(lambda x: x[None], out)

    def unpack(self, packed: Params) -> Params:
        return jax.tree.map(lambda x: x.sum(0), packed)


@dataclass(frozen=True)
class DataParallel(Separate):
    """Copies of the model whose gradients are summed once per step."""

    @property
    def out_spec(self) -> PartitionSpec:
        return PartitionSpec()

    def reduced(self, out: tuple[jax.Array, Params]) -> tuple[jax.Array, Params]:
        return jax.lax.psum(out, PIPE)

    def unpack(self, packed: Params) -> Params:
        return packed


@dataclass(frozen=True)
class FullySharded(OnPipe):
    """Fully sharded data parallelism: parameters and gradients are sharded over the devices, and parameters are
    gathered where they are used, in every microbatch."""

    batch_spec = PartitionSpec(PIPE)

    def pack(self, canonical: Params) -> Params:
        return canonical

    def specs(self) -> Params:
        def split(leaf: jax.ShapeDtypeStruct) -> PartitionSpec:
            axes = [n for n, size in enumerate(leaf.shape) if size % self.p == 0]
            if not axes:
                return PartitionSpec()
            widest = max(axes, key=lambda n: leaf.shape[n])
            return PartitionSpec(*(PIPE if n == widest else None for n in range(leaf.ndim)))

        return jax.tree.map(split, self.model.param_shapes())

    def value_and_grad(self, params: Params, batch: Batch) -> tuple[jax.Array, Params]:
        # As many sequences per microbatch as there are devices, so that each gets one microbatch's worth.
        batch = jax.tree.map(self._one_a_device, batch)
        return accumulated(self.model, params, batch, batch["tokens"].size, self.compute_dtype, self._gathered)

    def _gathered(self, params: Params) -> Params:
        """Whole parameters, whose gradients are sharded like the parameters."""
        return jax.tree.map(lambda w, spec: _gathered(w, self.mesh, spec), params, self.specs())

    def _one_a_device(self, x: jax.Array) -> jax.Array:
        m, B, L = x.shape
        x = jnp.moveaxis(x.reshape(self.p, m // self.p, B, L), 0, 1).reshape(m // self.p, self.p * B, L)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(None, PIPE)))

    def unpack(self, packed: Params) -> Params:
        return packed


def _gathered(w: jax.Array, mesh: Mesh, spec: PartitionSpec) -> jax.Array:
    def placed(x: jax.Array, spec: PartitionSpec) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    gather = jax.custom_vjp(lambda w: placed(w, PartitionSpec()))
    gather.defvjp(lambda w: (placed(w, PartitionSpec()), None), lambda _, g: (placed(g, spec),))
    return gather(w)
