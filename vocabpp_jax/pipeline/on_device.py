"""One device's part of a step: its parameters and its part of the batch in, loss and gradients out.

It runs inside ``shard_map`` and issues the collectives over the data axis, which are not schedule instructions: the
all-gather of weights, the reduce-scatter of gradients, the sums of losses and counts.

Shapes, per device: m microbatches, B microbatch, L length, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from ..schedules import Program, Schedule
from ..vocab import Loss, ahead
from ..vocab.instructions import VocabularySteps
from .collectives import collectives
from .executor import Executor
from .layout import Layout
from .linearize import Linearized, linearize
from .mesh import DATA, PIPE
from .microbatches import Batch
from .model_interface import Model
from .precision import exact_products
from .shares import Share
from .tail_passes import Tail, shifting

Params = Any


class OnDevice:
    """The part of a :class:`.Pipeline` that runs on its devices."""

    model: Model
    schedule: Schedule
    mesh: jax.sharding.Mesh
    compute_dtype: str
    layout: Layout
    rounded: Callable[[Params], Params]
    _block: Callable
    _depth: Callable | None

    def _on_device(self, program: Program, observe: bool, params: Params, batch: Batch) -> tuple:
        """One device's whole step."""
        with exact_products(self.compute_dtype):
            state = self._executor(program, observe, params, batch)()
        loss = state["loss"] if self.layout.sharded else jax.lax.psum(state["loss"], PIPE)
        if "auxiliary" in state:
            loss = loss.at[0].add(jax.lax.psum(state["auxiliary"], PIPE))
        counters = {k: state[k].reshape(1, 1) for k in ("in_flight", "clobbered")} if observe else {}
        grads = self._gradients(state, params) if program.schedule.trains else {}
        return jax.lax.psum(loss, DATA), grads, counters

    def _executor(self, program: Program, observe: bool, params: Params, batch: Batch) -> Executor:
        """Builds one device's executor from its part of the batch and of the parameters at rest."""
        with jax.named_scope("gather"):
            rounded = jax.tree.map(Share.gather, self.layout.shares, self.rounded(params))
        own = ("blocks", "tail") if self.layout.sharded else ("blocks", "tail", "embed", "head", "ahead")
        rounded |= {k: jax.tree.map(lambda w: w.reshape(w.shape[1:]), rounded[k]) for k in own if k in rounded}
        tables = {k: v for k, v in rounded.items() if k not in ("blocks", "tail")}
        model = self.model
        if not program.schedule.trains:
            model = replace(model, loss=Loss(soft_cap=model.loss.soft_cap))
        layout = replace(self.layout, model=model, schedule=program.schedule)
        vocabulary = VocabularySteps(
            layout,
            tables,
            {"tokens": batch["tokens"]} | self._targets(batch, trains=program.schedule.trains),
            collectives(layout.vocabulary_axes, program.schedule.p, self.mesh.devices.flat[0].platform),
        )
        _, B, L = batch["tokens"].shape
        x_BLD = jax.ShapeDtypeStruct((B, L, self.model.width), self.compute_dtype)
        tail = None
        if model.tail:
            x_2BLD = jax.ShapeDtypeStruct((2, *x_BLD.shape), x_BLD.dtype)
            passes = self._linearized(program, shifting(self._depth), x_2BLD, rounded["tail"][0], batch["aux_inputs"])
            tail = Tail(passes, vocabulary, rounded["tail"], batch["aux_inputs"], model.tail_aux_inputs)
        return Executor(
            program,
            layout,
            self._linearized(
                program, self._layer(program.schedule.trains), x_BLD, rounded["blocks"][0][0], batch["aux_inputs"]
            ),
            vocabulary,
            tables | {"blocks": rounded["blocks"]},
            batch["aux_inputs"],
            x_BLD,
            tail,
            model.auxiliary and program.schedule.trains,
            observe,
        )

    def _targets(self, batch: Batch, trains: bool) -> dict[str, jax.Array]:
        """The labels of the next token and of each further one, and their weights, both ``[m, 1 + depths, B, L]``.

        In training the weights are those of the total loss; in evaluation each depth's loss is its own mean.
        """
        labels, mask = ahead(batch["labels"], batch["mask"], self.model.depths, batch["aux_inputs"].get("segment_ids"))
        count = jnp.maximum(jax.lax.psum(mask.sum((0, 2, 3)), DATA), 1)
        if trains and (tail := self.model.tail):
            count = count[0] / jnp.array([1.0] + [tail.weight / tail.depths] * tail.depths)
        weight = mask / count[:, None, None]
        return {"labels": labels, "weight": weight}

    def _layer(self, trains: bool) -> Callable:
        """The block. Its scalar, if any, is scaled for the mean over microbatches and copies; evaluation drops it."""
        if not self.model.auxiliary:
            return self._block

        def layer(params: Params, x: jax.Array, aux_inputs: Any) -> Any:
            x, scalar = self._block(params, x, aux_inputs)
            share = 1 / (self.schedule.m * self.mesh.shape[DATA])
            return (x, scalar.astype(jnp.float32) * share) if trains else x

        return layer

    def _linearized(
        self, program: Program, function: Callable, x: jax.ShapeDtypeStruct, params: Params, aux_inputs: Any
    ) -> Linearized:
        one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), aux_inputs)
        one |= jax.tree.map(shape_of, self._one_layer_aux_inputs)
        if not program.schedule.trains:
            return Linearized(lambda p, s, x: (function(p, x, s), (), ()), None, None, (), (), ())
        return linearize(function, jax.tree.map(shape_of, params), x, one, split=program.schedule.splits_backward)

    @property
    def _one_layer_aux_inputs(self) -> dict[str, Any]:
        return self.model.layer_aux_inputs[0] if self.model.layer_aux_inputs else {}

    def _gradients(self, state: dict[str, Any], params: Params) -> Params:
        """The accumulated gradients as a tree like the parameters at rest, reduced over the data axis and over the
        devices that hold copies of a parameter."""
        grads = {
            "blocks": tuple(state[f"grads.blocks.{c}"] for c in range(len(params["blocks"]))),
            "embed": {k: state[f"grads.embed.{k}"] for k in params["embed"]},
            "final": state["grads.final"],
        }
        grads |= {name: state[f"grads.{name}"] for name in ("head", "tail") if name in params}
        if self.layout.copied:
            grads["ahead"] = {name: state[f"grads.ahead.{name}"] for name in self.layout.copied}
        grads = jax.tree.map(lambda g, w: g.reshape((1,) * (w.ndim - g.ndim) + g.shape), grads, params)
        if self.mesh.shape[DATA] > 1:
            with jax.named_scope("scatter"):
                grads = jax.tree.map(Share.scatter, self.layout.shares, grads)
        grads["final"] = jax.lax.psum(grads["final"], PIPE)
        first, last = (jax.lax.axis_index(PIPE) == self.schedule.placement[n] for n in (0, -1))
        if self.layout.tied_across:
            table = jax.lax.psum(grads["embed"]["tokens"], PIPE)
            grads["embed"]["tokens"] = jnp.where(first | last, table, 0)
        for name in self.layout.copied:
            own = grads["embed"][name]
            table = jax.lax.psum(jnp.where(first, own, 0) + grads["ahead"][name], PIPE)
            grads["embed"][name] = jnp.where(first, table, own)
            grads["ahead"][name] = jnp.where(last, table, 0)
        return grads


def shape_of(a: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array or :class:`jax.ShapeDtypeStruct`."""
    return jax.ShapeDtypeStruct(a.shape, a.dtype)
