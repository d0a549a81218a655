"""The train step: a pipeline's gradients, clipped by their global norm, passed to an optax optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from ..pipeline.pipeline import Batch, Pipeline
from .elementwise import refuse_mixing

Metrics = dict[str, jax.Array]


class State(NamedTuple):
    """The training state: steps done, float32 master parameters in the pipeline's layout, optimizer state, and the
    number of steps skipped because the loss or gradient was not finite.

    With the pipeline's ``shard_optimizer``, parameters and per-parameter optimizer state are sharded over the data
    axis.
    """

    step: jax.Array
    params: Any
    optimizer: Any
    skipped: jax.Array


def global_norm(pipe: Pipeline, grads: Any) -> jax.Array:
    """The norm of the whole gradient, over all stages and shards, counting every parameter once."""
    squares = jax.tree.map(lambda g, unique: jnp.sum(unique * jnp.square(g)), grads, pipe.layout.unique())
    return jnp.sqrt(jax.tree.reduce(jnp.add, squares))


def shapes(pipe: Pipeline, optimizer: optax.GradientTransformation) -> State:
    """Every leaf of the state as a global :class:`jax.ShapeDtypeStruct`."""
    params, scalar = pipe.layout.shapes(), jax.ShapeDtypeStruct((), jnp.int32)
    return State(scalar, params, jax.eval_shape(optimizer.init, params), scalar)


def shardings(pipe: Pipeline, optimizer: optax.GradientTransformation) -> State:
    """The sharding of every leaf: moments are sharded like their parameters; everything else is replicated."""
    everywhere = NamedSharding(pipe.mesh, PartitionSpec())
    whole = shapes(pipe, optimizer)
    moments = optax.tree_utils.tree_map_params(
        optimizer,
        lambda x, sharding, param: sharding if x.shape == param.shape else everywhere,
        whole.optimizer,
        pipe.shardings,
        whole.params,
        transform_non_params=lambda _: everywhere,
    )
    return State(everywhere, pipe.shardings, moments, everywhere)


def init_state(pipe: Pipeline, optimizer: optax.GradientTransformation, key: jax.Array) -> State:
    """A state at step 0, created in its final sharding. The same key gives a bit-identical model under any layout."""
    return start_from(pipe, optimizer, pipe.init(key))


def start_from(pipe: Pipeline, optimizer: optax.GradientTransformation, params: Any) -> State:
    """A state at step 0 with the given parameters, float32 in the pipeline's layout; their buffers are donated."""
    return make_start(pipe, optimizer)(params)


def make_start(pipe: Pipeline, optimizer: optax.GradientTransformation) -> Callable[[Any], State]:
    """``params -> state`` at step 0, compiled; the parameters' buffers are donated to the state."""

    def begin(params: Any) -> State:
        none = jnp.zeros((), jnp.int32)
        return State(none, params, optimizer.init(params), none)

    return jax.jit(begin, donate_argnums=0, out_shardings=shardings(pipe, optimizer))


def make_step(
    pipe: Pipeline,
    optimizer: optax.GradientTransformation,
    clip: float | None = 1.0,
    without_flags: tuple[str, ...] = (),
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """``(state, batch) -> state, metrics``, compiled; the old state's buffers are donated to the new.

    Args:
        clip: the largest global gradient norm; a larger gradient is scaled down to it. None disables clipping.
        without_flags: names of :data:`~vocabpp_jax.pipeline.flags.FLAGS`, which GPUs get, to leave out.

    A step whose loss or gradient is not finite changes neither parameters nor optimizer state; it is counted.

    Metrics are scalars, the same on every device: ``loss`` (mean over valid tokens), ``grad_norm`` before clipping,
    ``skipped`` steps so far; with a tail also ``main_loss``, the next-token part of the loss.

    Raises:
        ValueError: the optimizer is not elementwise, or what :meth:`.Pipeline.jit` rejects.
    """
    refuse_mixing(optimizer, pipe.layout.shapes())

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        losses, grads = pipe.losses_and_grad(state.params, batch)
        loss = losses.sum()
        norm = global_norm(pipe, grads)
        if clip is not None:
            scale = jnp.minimum(1.0, clip / (norm + 1e-6))
            grads = jax.tree.map(lambda g: g * scale, grads)
        updates, moments = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        params, moments = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, moments), (state.params, state.optimizer)
        )
        new = State(state.step + 1, params, moments, state.skipped + ~finite)
        metrics = {"loss": loss, "grad_norm": norm, "skipped": new.skipped}
        return new, metrics | ({"main_loss": losses[0]} if pipe.model.tail else {})

    everywhere = NamedSharding(pipe.mesh, PartitionSpec())
    return pipe.jit(
        step,
        without_flags=without_flags,
        donate_argnums=0,
        out_shardings=(shardings(pipe, optimizer), everywhere),
    )


def make_evaluation(pipe: Pipeline, without_flags: tuple[str, ...] = ()) -> Callable[[Any, Batch], jax.Array]:
    """``(params, batch) -> losses [1 + depths]``, compiled: the forward-only program. ``without_flags`` as in
    :func:`make_step`."""
    return pipe.jit(pipe.evaluate_depths, without_flags=without_flags)
