"""The library's one door: a model, a schedule and a mesh in; loss and gradients out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..schedules import Program, Schedule, check, evaluation, lower
from .flags import compiler_options
from .initialization import draw
from .layout import Layout
from .linearize import linearize
from .mesh import DATA, PIPE, automatic
from .microbatches import Batch, checked, global_batch
from .model_interface import Model
from .nccl import keep_launch_order
from .on_device import OnDevice, shape_of
from .tensor import TENSOR

Params = Any
_PER_MICROBATCH = PartitionSpec(None, DATA)


@dataclass(frozen=True)
class Pipeline(OnDevice):
    """A model under a schedule on a mesh.

    A batch is ``{"tokens", "labels": int32 [m, B, L]}``, and if need be ``"mask"`` of the same shape and
    ``"aux_inputs"``, arrays ``[m, B, ...]`` by name that the blocks take: m microbatches, B microbatch size times the
    data axis, L length. Or all of them ``[m · B, ...]``, which is split into microbatches. A label of -100 does not
    count; of other ids outside the vocabulary the loss is NaN, or, outside ``jax.jit``, they are refused. Parameters
    are a tree in :attr:`layout`, float32, sharded as :attr:`shardings` says: with ``shard_optimizer`` over the axis
    ``data`` too, as is what an optimizer keeps for them.

    Raises:
        ValueError: the schedule is not sound, the mesh has no axis ``data`` or its axis ``pipe`` is not the schedule's
            p, layers do not fill its stages, or the model's kernels are not for the mesh's devices.
    """

    model: Model
    schedule: Schedule
    mesh: Mesh
    compute_dtype: str = "float32"
    shard_optimizer: bool = True
    layout: Layout = field(init=False, repr=False)
    _block: Callable = field(init=False, repr=False, compare=False)
    """A layer, or one device's part of it, for the devices of the mesh."""
    _depth: Callable | None = field(init=False, repr=False, compare=False)
    """So a depth of the tail."""

    def __post_init__(self) -> None:
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"compute_dtype is {self.compute_dtype!r}; it is float32 or bfloat16")
        if DATA not in self.mesh.shape:
            raise ValueError(
                f"the mesh's axes are {self.mesh.axis_names}; it needs {DATA!r} as well, of size 1 for one pipeline"
            )
        if self.mesh.shape.get(PIPE) != self.schedule.p:
            raise ValueError(
                f"the mesh's axis {PIPE!r} is {self.mesh.shape.get(PIPE)}; the schedule's p is {self.schedule.p}"
            )
        check(self.schedule)
        keep_launch_order()
        object.__setattr__(self, "mesh", automatic(self.mesh))
        object.__setattr__(self, "schedule", replace(self.schedule, depths=self.model.depths))
        copies = self.mesh.shape[DATA] if self.shard_optimizer else 1
        layout = Layout(self.model, self.schedule, self.mesh.shape.get(TENSOR, 1), copies)
        object.__setattr__(self, "layout", layout)
        model, whole = self.model, self.layout.tensor == 1
        platform = self.mesh.devices.flat[0].platform
        block = model.block if whole else model.tensor.block
        depth = model.tail and (model.tail.depth if whole else model.tail.tensor.block)
        for name, function in (("_block", block), ("_depth", depth)):
            object.__setattr__(self, name, function.on(platform) if hasattr(function, "on") else function)

    @cached_property
    def program(self) -> Program:
        """The lowered schedule."""
        return lower(self.schedule)

    @cached_property
    def shardings(self) -> Params:
        """The NamedSharding of every parameter, at rest."""
        return jax.tree.map(
            partial(NamedSharding, self.mesh), self.layout.specs(), is_leaf=lambda s: isinstance(s, PartitionSpec)
        )

    def init(self, key: jax.Array) -> Params:
        """What ``model.init(key)`` draws, to the bit, each parameter drawn where it lives.

        Takes the memory of the parameters and of one layer. Raises ValueError for a key that is not threefry's.
        """
        return draw(self.layout, self.mesh, key)

    def shard(self, canonical: Params) -> Params:
        """Canonical parameters, placed on the mesh in the pipeline's layout."""
        return jax.jit(self.layout.pack, out_shardings=self.shardings)(canonical)

    def global_batch(self, local: Batch) -> Batch:
        """The global batch of which each process passes its own rows, ``[rows, L]``, as a data loader gives them.

        Every process passes as many, and those with devices of the same copy of the model pass the same.
        """
        return global_batch(local, self.mesh)

    def jit(self, function: Callable, *, without_flags: tuple[str, ...] = (), **options: Any) -> Callable:
        """``jax.jit`` for a function that runs this pipeline: on GPUs with the XLA flags that overlap needs.

        Args:
            function: anything that calls :meth:`value_and_grad` or :meth:`evaluate`, or one of them.
            without_flags: names of :data:`~vocabpp_jax.flags.FLAGS` to leave out.
            options: what ``jax.jit`` takes.

        Raises:
            ValueError: an unknown name in ``without_flags``, or a flag that this jaxlib does not take.
        """
        return jax.jit(function, compiler_options=compiler_options(self.mesh, without_flags), **options)

    def value_and_grad(self, params: Params, batch: Batch) -> tuple[jax.Array, Params]:
        """The loss, and its float32 gradients sharded as the parameters are. Pure: put it under :meth:`jit`."""
        losses, grads = self.losses_and_grad(params, batch)
        return losses.sum(), grads

    def losses_and_grad(self, params: Params, batch: Batch) -> tuple[jax.Array, Params]:
        """What :meth:`value_and_grad` returns, its loss in parts ``[1 + depths]``: the next token's, and what each
        further one that is predicted adds. Pure: put it under :meth:`jit`."""
        losses, grads, _ = self._run(self.program, params, batch, observe=False)
        return losses, grads

    def observed_value_and_grad(self, params: Params, batch: Batch) -> tuple[jax.Array, Params, dict[str, jax.Array]]:
        """Also what the running program counts: ``in_flight [data, p]``, the most activations alive at once on a
        device, and ``clobbered [data, p]``, whether one was ever overwritten while alive or freed while dead."""
        losses, grads, seen = self._run(self.program, params, batch, observe=True)
        return losses.sum(), grads, seen

    def evaluate(self, params: Params, batch: Batch) -> jax.Array:
        """The cross entropy alone, by a forward-only program that keeps no activations: a soft cap is part of the
        model, a z-loss and smoothed labels are there for training, and so is what predicts further tokens."""
        return self.evaluate_depths(params, batch)[0]

    def evaluate_depths(self, params: Params, batch: Batch) -> jax.Array:
        """Beside :meth:`evaluate` the cross entropy of every further token that is predicted, ``[1 + depths]``, each
        the mean over the tokens that count for it."""
        return self._run(self._evaluation, params, batch, observe=False)[0]

    @cached_property
    def _evaluation(self) -> Program:
        return lower(evaluation(self.schedule))

    def rounded(self, params: Params) -> Params:
        """The parameters as passes take them: a copy in the compute dtype, or in the model's own for a parameter.

        Of an embedding that is not the head too there is none, where it need not be gathered: a lookup rounds the rows
        that it reads.
        """
        rounded = jax.tree.map(lambda w: w.astype(self.compute_dtype), params)
        rounded["blocks"] = tuple(tuple(self._as_taken("blocks", w) for w in chunk) for chunk in params["blocks"])
        rounded["final"] = self._as_taken("final", params["final"])
        if "tail" in params:
            rounded["tail"] = tuple(self._as_taken("tail", w) for w in params["tail"])
        if self.layout.data > 1:
            return rounded
        looked_up = ("ahead",) if self.layout.head_is_embedding else ("embed", "ahead")
        return rounded | {name: params[name] for name in looked_up if name in params}

    def _as_taken(self, part: str, params: Params) -> Params:
        dtypes = self.model.dtypes(part, params, self.compute_dtype)
        return jax.tree.map(lambda w, dtype: w.astype(dtype), params, dtypes)

    def activation_bytes(self, batch: int, length: int, aux_inputs: Any = None) -> dict[str, int]:
        """Bytes that one microbatch in flight costs on a device, counted from the traced block.

        ``residual`` waits from F to B, ``kept`` from F to W, ``carried`` from B to W; ``batch`` is sequences a device.
        """
        x = jax.ShapeDtypeStruct((batch, length, self.model.width), self.compute_dtype)
        aux_inputs = (aux_inputs or {}) | jax.tree.map(shape_of, self._one_layer_aux_inputs)
        traced = []

        def trace(layer: Params) -> None:
            dtypes = self.model.dtypes("blocks", layer, self.compute_dtype)
            block = jax.tree.map(lambda w, dtype: jax.ShapeDtypeStruct(w.shape[1:], dtype), layer, dtypes)
            traced.append(linearize(self._layer(True), block, x, aux_inputs, split=self.schedule.splits_backward))

        layer, specs = (tree["blocks"][0][0] for tree in (self.layout.shapes_in_use(), self.layout.specs_in_use()))
        jax.eval_shape(jax.shard_map(trace, mesh=self.mesh, in_specs=(specs,), out_specs=None, check_vma=False), layer)
        passes = traced[0]
        return {
            ring: self.layout.depth * sum(s.size * s.dtype.itemsize for s in getattr(passes, ring))
            for ring in ("residual", "kept", "carried")
        }

    def buffer_bytes(self, batch: int, length: int) -> dict[str, int]:
        """Bytes of every buffer that a device's program carries: rings, gradients, what is under way.

        ``batch`` is sequences a device.
        """
        shape = (self.schedule.m, batch * self.mesh.shape[DATA], length)
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
        batches = {
            "tokens": tokens,
            "labels": tokens,
            "mask": jax.ShapeDtypeStruct(shape, jnp.float32),
            "aux_inputs": {},
        }
        buffers = jax.shard_map(
            lambda params, batch: self._executor(self.program, False, params, batch).initial_state(),
            mesh=self.mesh,
            in_specs=(self.layout.specs(), jax.tree.map(lambda _: _PER_MICROBATCH, batches)),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        found = jax.eval_shape(buffers, self.layout.shapes(), batches)
        return {name: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) for name, tree in found.items()}

    def _run(self, program: Program, params: Params, batch: Batch, *, observe: bool) -> tuple:
        batch = checked(batch, self.schedule.m, self.mesh.shape[DATA], self.model)
        specs = self.layout.specs()
        device = PartitionSpec(DATA, PIPE)
        out = (
            PartitionSpec(),
            specs if program.schedule.trains else {},
            {"in_flight": device, "clobbered": device} if observe else {},
        )
        run = jax.shard_map(
            partial(self._on_device, program, observe),
            mesh=self.mesh,
            in_specs=(specs, jax.tree.map(lambda _: _PER_MICROBATCH, batch)),
            out_specs=out,
            check_vma=False,
        )
        return run(params, batch)
