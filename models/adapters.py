"""Build a model from your own layers: a Flax NNX module, an Equinox module, or any callable pytree.

Each function takes a factory for one layer, and passes other fields on to :class:`vocabpp_jax.Model`. A layer keeps the
shape and dtype of ``x [B, L, D]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vocabpp_jax.pipeline.model_interface import AuxInputs, Model, Params

Call = Callable[[Any, jax.Array, AuxInputs], Any]


def _plainly(layer: Any, x: jax.Array, aux_inputs: AuxInputs) -> Any:
    return layer(x)


def from_nnx(
    make: Callable[[nnx.Rngs], nnx.Module],
    *,
    layers: int,
    vocab_size: int,
    width: int,
    call: Call = _plainly,
    init_std: float = 0.02,
    **model: Any,
) -> Model:
    """A model whose layers are Flax NNX modules.

    Args:
        make: creates one layer from its rngs.
        layers: number of layers.
        vocab_size: vocabulary size V.
        width: D.
        call: how to call a layer, ``(layer, x [B, L, D], aux_inputs) -> x``, or ``(x, scalar)`` with
            ``auxiliary=True``; ``layer(x)`` by default.
        init_std: standard deviation of the initial vocabulary tables.
        model: other fields of :class:`vocabpp_jax.Model`.
    """
    graph = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    def block(params: Params, x: jax.Array, aux_inputs: AuxInputs) -> Any:
        return call(nnx.merge(graph, params), x, aux_inputs)

    def init_block(key: jax.Array, layer: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(key))))

    return _model(block, init_block, layers, vocab_size, width, init_std, model)


def from_pytree(
    make: Callable[[jax.Array], Any],
    *,
    layers: int,
    vocab_size: int,
    width: int,
    call: Call = _plainly,
    init_std: float = 0.02,
    **model: Any,
) -> Model:
    """A model whose layers are callable pytrees, such as Equinox modules.

    A layer's floating-point array leaves are its parameters, named by their paths; everything else is the same in all
    layers.

    Args:
        make: creates one layer from a key.
        layers: number of layers.
        vocab_size: vocabulary size V.
        width: D.
        call: as for :func:`from_nnx`. Equinox's own layers take a single vector: vmap them over batch and length here.
        init_std: as for :func:`from_nnx`.
        model: other fields of :class:`vocabpp_jax.Model`.

    Raises:
        ValueError: a layer has no parameters.
    """
    example = make(jax.random.key(0))
    leaves, tree = jax.tree_util.tree_flatten_with_path(example)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    trained = [jnp.issubdtype(getattr(leaf, "dtype", bool), jnp.floating) for _, leaf in leaves]
    if not any(trained):
        raise ValueError(
            f"a layer has no parameters: {type(example).__name__} has no floating-point array among its leaves"
        )

    def block(params: Params, x: jax.Array, aux_inputs: AuxInputs) -> Any:
        own = [params[name] if t else leaf for name, t, (_, leaf) in zip(names, trained, leaves, strict=True)]
        return call(tree.unflatten(own), x, aux_inputs)

    def init_block(key: jax.Array, layer: jax.Array) -> Params:
        made = jax.tree.leaves(make(key))
        return {name: leaf.astype(jnp.float32) for name, t, leaf in zip(names, trained, made, strict=True) if t}

    return _model(block, init_block, layers, vocab_size, width, init_std, model)


def _model(
    block: Callable, init_block: Callable, layers: int, vocab_size: int, width: int, init_std: float, fields: dict
) -> Model:
    def init_row(key: jax.Array, table: str) -> jax.Array:
        return init_std * jax.random.normal(key, (width,))

    given = {"layers": layers, "vocab_size": vocab_size, "width": width, "block": block, "init_block": init_block}
    return Model(**({"init_row": init_row} | given | fields))
