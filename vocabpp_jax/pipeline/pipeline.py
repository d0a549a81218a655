"""Main entry point: computes loss and gradients of a model under a pipeline schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
    """Runs a model under a schedule on a mesh.

    A batch is ``{"tokens", "labels": int32 [m, B, L]}``, optionally with ``"mask"`` of the same shape and
    ``"aux_inputs"``, a dictionary of arrays ``[m, B, ...]`` for the blocks: m microbatches, B microbatch size times the
    size of the data axis, L length. All arrays may instead be ``[m · B, ...]`` and are then split into microbatches.
    Labels of -100 are ignored. Other ids outside the vocabulary make the loss NaN or, outside ``jax.jit``, raise
    ValueError. Parameters are a float32 tree in :attr:`layout`, sharded as in :attr:`shardings`; with
    ``shard_optimizer`` they and the optimizer state are also sharded over the axis ``data``.

    Raises:
        ValueError: the schedule is invalid, the mesh has no axis ``data``, the size of its axis ``pipe`` is not the
            schedule's p, there are too few layers for the stages, or the model's kernels do not support the devices.
    """

    model: Model
    schedule: Schedule
    mesh: Mesh
    compute_dtype: str = "float32"
    shard_optimizer: bool = True
    layout: Layout = field(init=False, repr=False)
    _block: Callable = field(init=False, repr=False, compare=False)
    """The block, or its tensor-parallel form, for the mesh's platform."""
    _depth: Callable | None = field(init=False, repr=False, compare=False)
    """The same for a depth of the tail."""

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
        """The NamedSharding of every parameter at rest."""
        return jax.tree.map(
            partial(NamedSharding, self.mesh), self.layout.specs(), is_leaf=lambda s: isinstance(s, PartitionSpec)
        )

    def init(self, key: jax.Array) -> Params:
        """Parameters bitwise equal to those of ``model.init(key)``, each drawn on the device that holds it.

        Needs memory for the parameters and one more layer. Raises ValueError if ``key`` is not a threefry key.
        """
        return draw(self.layout, self.mesh, key)

    def shard(self, canonical: Params) -> Params:
        """Converts canonical parameters, on the host, to the pipeline's layout and places each device's part on it."""
        packed = self.layout.pack(jax.device_get(canonical), xp=np)
        return jax.tree.map(
            lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda part: x[part]),
            packed,
            self.shardings,
        )

    def global_batch(self, local: Batch) -> Batch:
        """Assembles a global batch from the rows ``[rows, L]`` that each process passes, as loaded by a data loader.

        Every process passes the same number of rows; processes that share a model copy pass the same rows.
        """
        return global_batch(local, self.mesh)

    def jit(self, function: Callable, *, without_flags: tuple[str, ...] = (), **options: Any) -> Callable:
        """``jax.jit`` for a function that runs this pipeline; on GPUs it sets the XLA flags needed for overlap.

        Args:
            function: anything that calls :meth:`value_and_grad` or :meth:`evaluate`, or one of them.
            without_flags: names of :data:`~vocabpp_jax.flags.FLAGS` to leave out.
            options: passed to ``jax.jit``.

        Raises:
            ValueError: ``without_flags`` has an unknown name, or this jaxlib does not support a flag.
        """
        return jax.jit(function, compiler_options=compiler_options(self.mesh, without_flags), **options)

    def value_and_grad(self, params: Params, batch: Batch) -> tuple[jax.Array, Params]:
        """The loss, and float32 gradients sharded like the parameters. Pure; call it under :meth:`jit`."""
        losses, grads = self.losses_and_grad(params, batch)
        return losses.sum(), grads

    def losses_and_grad(self, params: Params, batch: Batch) -> tuple[jax.Array, Params]:
        """Like :meth:`value_and_grad`, with the loss in parts ``[1 + depths]``: the next token's loss, and the
        contribution of each further predicted token. Pure; call it under :meth:`jit`."""
        losses, grads, _ = self._run(self.program, params, batch, observe=False)
        return losses, grads

    def observed_value_and_grad(self, params: Params, batch: Batch) -> tuple[jax.Array, Params, dict[str, jax.Array]]:
        """Like :meth:`value_and_grad`, plus counters from the running program: ``in_flight [data, p]``, the most
        activations in flight on a device, and ``clobbered [data, p]``, whether one was overwritten while alive or freed
        while dead."""
        losses, grads, seen = self._run(self.program, params, batch, observe=True)
        return losses.sum(), grads, seen

    def evaluate(self, params: Params, batch: Batch) -> jax.Array:
        """The cross entropy, computed by a forward-only program that stores no activations. A soft cap is part of the
        model and applies; z-loss, label smoothing and the loss of further tokens are for training only."""
        return self.evaluate_depths(params, batch)[0]

    def evaluate_depths(self, params: Params, batch: Batch) -> jax.Array:
        """The cross entropies ``[1 + depths]`` of the next token, as in :meth:`evaluate`, and of each further predicted
        one. Each is the mean over its own counted tokens."""
        return self._run(self._evaluation, params, batch, observe=False)[0]

    @cached_property
    def _evaluation(self) -> Program:
        return lower(evaluation(self.schedule))

    def rounded(self, params: Params) -> Params:
        """The parameters cast to the dtypes in which passes use them: the compute dtype, or the model's choice.

        An embedding that is not also the head is left uncast unless it has to be gathered: lookups cast the rows they
        read.
        """
        rounded = jax.tree.map(lambda w: w.astype(self.compute_dtype), params)
        rounded["blocks"] = tuple(tuple(self._cast("blocks", w) for w in chunk) for chunk in params["blocks"])
        rounded["final"] = self._cast("final", params["final"])
        if "tail" in params:
            rounded["tail"] = tuple(self._cast("tail", w) for w in params["tail"])
        if self.layout.data > 1:
            return rounded
        looked_up = ("ahead",) if self.layout.head_is_embedding else ("embed", "ahead")
        return rounded | {name: params[name] for name in looked_up if name in params}

    def _cast(self, part: str, params: Params) -> Params:
        dtypes = self.model.dtypes(part, params, self.compute_dtype)
        return jax.tree.map(lambda w, dtype: w.astype(dtype), params, dtypes)

    def activation_bytes(self, batch: int, length: int, aux_inputs: Any = None) -> dict[str, int]:
        """Activation bytes per device of one microbatch in flight, counted from the traced block.

        ``residual`` is stored from F to B, ``kept`` from F to W, ``carried`` from B to W. ``batch`` is the number of
        sequences per device.
        """
        x_BLD = jax.ShapeDtypeStruct((batch, length, self.model.width), self.compute_dtype)
        aux_inputs = (aux_inputs or {}) | jax.tree.map(shape_of, self._one_layer_aux_inputs)
        traced = []

        def trace(layer: Params) -> None:
            dtypes = self.model.dtypes("blocks", layer, self.compute_dtype)
            block = jax.tree.map(lambda w, dtype: jax.ShapeDtypeStruct(w.shape[1:], dtype), layer, dtypes)
            traced.append(linearize(self._layer(True), block, x_BLD, aux_inputs, split=self.schedule.splits_backward))

        layer, specs = (tree["blocks"][0][0] for tree in (self.layout.shapes_in_use(), self.layout.specs_in_use()))
        jax.eval_shape(jax.shard_map(trace, mesh=self.mesh, in_specs=(specs,), out_specs=None, check_vma=False), layer)
        passes = traced[0]
        return {
            ring: self.layout.depth * sum(s.size * s.dtype.itemsize for s in getattr(passes, ring))
            for ring in ("residual", "kept", "carried")
        }

    def buffer_bytes(self, batch: int, length: int) -> dict[str, int]:
        """Bytes of every buffer in a device's program: rings, gradients, collectives in flight.

        ``batch`` is the number of sequences per device.
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
