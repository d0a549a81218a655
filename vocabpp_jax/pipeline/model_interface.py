"""What the pipeline asks of a model: a few pure functions and one canonical tree of parameters.

The executor, the layouts and the vocabulary layers see a model only through :class:`Model`. Flax, or any other
library, stays behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from ..vocab import Loss

Params = Any  # a pytree of arrays
AuxInputs = dict[str, jax.Array]  # per-microbatch arrays that no gradient flows into, e.g. segment ids


def _identity(params: Params, x: jax.Array) -> jax.Array:
    return x


def _nothing(key: jax.Array) -> Params:
    return {}


@dataclass(frozen=True)
class TensorSplit:
    """How blocks are spread over the mesh axis ``tensor``; see :mod:`vocabpp_jax.pipeline.tensor`."""

    block: Callable[[Params, jax.Array, AuxInputs], jax.Array]
    """A block for one device's part of its parameters, with the sums over the axis in it."""
    specs: Params
    """A tree like a block's parameters, of PartitionSpecs that name the axis where a parameter is split."""
    parts: int
    """The axis must divide this (heads, where whole heads go to devices)."""


@dataclass(frozen=True, eq=False)
class Tail:
    """What predicts ``depths`` tokens beyond the next, from behind the last layer; see :mod:`vocabpp_jax.models.tail`.

    The loss is ``main + weight / depths · Σ depth losses``, each the sum over its tokens divided by the number of
    labels that count for the main loss, as published. Depth k of position i has the label of position i + k; it counts
    where that does, and where both are in one document (``aux_inputs["segment_ids"]``) of one row.
    """

    depths: int
    weight: float
    """λ: what all depths together weigh beside the main loss."""
    depth: Callable[[Params, jax.Array, jax.Array, AuxInputs], jax.Array]
    """One depth: ``(depth_params, h [B, L, D], embedded [B, L, D], aux_inputs) -> h``, pure, same dtype out as in.
    ``embedded`` is the input layer's output so many tokens ahead, 0 beyond the row's end. May have ``on(platform)``."""
    init_depth: Callable[[jax.Array, jax.Array], Params]
    """``(key, depth) -> depth_params`` in float32, as :attr:`Model.init_block`."""
    tensor: TensorSplit | None = None
    """How a depth runs on a mesh with an axis ``tensor``, or None if it cannot; its ``block`` takes what ``depth``
    takes."""

    def __post_init__(self) -> None:
        if self.depths < 1:
            raise ValueError(f"mtp_depth is {self.depths}; a tail needs at least 1, and 0 is none")
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"mtp_weight is {self.weight}; it must be above 0 and finite")


@dataclass(frozen=True, eq=False)  # compared and hashed by identity, as its functions are
class Model:
    """A decoder as a pipeline sees it: embedding, ``layers`` equal blocks, a final function, an LM head.

    Canonical parameters, which :meth:`init` draws and checkpoints hold, are the tree::

        {"embed":  {"tokens": [V, D], "positions": [L, D]},   # "positions" only where `positions` is set
         "blocks": (block_0, ..., block_{layers-1}),           # equal structures and shapes, in depth order
         "final":  ...,                                        # whatever `final` takes, may be {}
         "head":   [V, D],                                     # absent where `tied`
         "tail":   (depth_1, ..., depth_D)}                    # absent without a `tail`

    Shapes: B batch, L length, D model width, V vocabulary.
    """

    layers: int
    vocab_size: int
    width: int
    block: Callable[[Params, jax.Array, AuxInputs], jax.Array]
    """One layer: ``(block_params, x [B, L, D], aux_inputs) -> x [B, L, D]``, pure, same dtype out as in. One that
    chooses kernels by the devices has a method ``on(platform)``, which returns the block for them; a platform is what
    :attr:`jax.Device.platform` says."""
    init_block: Callable[[jax.Array, jax.Array], Params]
    """``(key, layer) -> block_params`` in float32: one layer's initial parameters. ``layer`` is an int32 scalar and may
    be traced, so that every device can draw a layer of its own with the same program."""
    init_row: Callable[[jax.Array, str], jax.Array]
    """``(key, table) -> [D]`` in float32: one initial row of ``"tokens"``, ``"positions"`` or ``"head"``."""
    init_final: Callable[[jax.Array], Params] = _nothing
    """``(key) -> final_params`` in float32."""
    final: Callable[[Params, jax.Array], jax.Array] = _identity
    """From the last block to the head, usually a norm: ``(final_params, x [N, D]) -> x [N, D]``, N tokens."""
    positions: int | None = None
    """Rows of a learned position table, or None without one."""
    tied: bool = False
    """The head is the token embedding."""
    embed_scale: float = 1.0
    """Factor on the embedded input (Gemma: the square root of the width)."""
    loss: Loss = Loss()
    """What is minimised: plain cross entropy, or with a soft cap, a z-loss, smoothed labels."""
    layer_aux_inputs: tuple[AuxInputs, ...] = ()
    """What differs between layers and is not trained, one dictionary of arrays a layer with equal names and shapes,
    or none: a block finds its own among ``aux_inputs``. Gemma 2's local and global layers differ by such a number."""
    tensor: TensorSplit | None = None
    """How blocks run on a mesh with an axis ``tensor``, or None if they cannot."""
    auxiliary: bool = False
    """A block returns ``(x, scalar)``: in training the sum of all layers' scalars joins the loss, its mean over
    microbatches and over the parts that the data axis makes of them. Routers balance their load this way."""
    tail: Tail | None = None
    """What predicts further tokens than the next, or None."""
    param_dtype: Callable[[str], str | None] | None = None
    """In which dtype passes take a parameter, by its path: ``"blocks/router/kernel"``, ``"tail/..."``, ``"final/..."``,
    without the numbers of layers. None is the pipeline's ``compute_dtype``, in which the vocabulary's tables always
    are. Where routers or norms compute in float32 among blocks in bfloat16, the function returns ``"float32"``."""

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ValueError(f"layers is {self.layers}; a model needs at least 1")
        if self.vocab_size < 2:
            raise ValueError(f"vocab_size is {self.vocab_size}; a vocabulary needs at least 2 tokens")
        if self.layer_aux_inputs and len(self.layer_aux_inputs) != self.layers:
            raise ValueError(
                f"layer_aux_inputs has {len(self.layer_aux_inputs)} entries; give one for each of {self.layers} layers"
            )

    def init(self, key: jax.Array) -> Params:
        """Canonical parameters in float32, all of them on one device: what :meth:`.Pipeline.init` draws for ``key``."""
        tables = {"tokens": self.vocab_size} | ({} if self.positions is None else {"positions": self.positions})
        params = {
            "embed": {name: self.draw_rows(key, name, jnp.arange(rows)) for name, rows in tables.items()},
            "blocks": tuple(self.draw_block(key, jnp.int32(layer)) for layer in range(self.layers)),
            "final": self.draw_final(key),
        }
        if not self.tied:
            params["head"] = self.draw_rows(key, "head", jnp.arange(self.vocab_size))
        if self.tail:
            params["tail"] = tuple(self.draw_depth(key, k) for k in range(self.depths))
        return params

    def draw_block(self, key: jax.Array, layer: jax.Array) -> Params:
        """The initial parameters of one layer of the model of ``key``."""
        return self.init_block(jax.random.fold_in(_key_of("blocks", key), layer), layer)

    def draw_rows(self, key: jax.Array, table: str, rows: jax.Array) -> jax.Array:
        """Initial rows ``[len(rows), D]`` of a table. Each depends only on its own number, so shards draw their own."""
        key = _key_of(table, key)
        return jax.vmap(lambda row: self.init_row(jax.random.fold_in(key, row), table))(rows)

    def draw_depth(self, key: jax.Array, depth: int) -> Params:
        """The initial parameters of one depth of the tail, from 0."""
        return self.tail.init_depth(jax.random.fold_in(_key_of("tail", key), depth), jnp.int32(depth))

    @property
    def depths(self) -> int:
        """Tokens beyond the next that are predicted."""
        return self.tail.depths if self.tail else 0

    @property
    def tail_aux_inputs(self) -> AuxInputs:
        """What the tail's layers find among ``aux_inputs`` as their own: the last layer's."""
        return self.layer_aux_inputs[-1] if self.layer_aux_inputs else {}

    def draw_final(self, key: jax.Array) -> Params:
        """The initial parameters of the final function."""
        return self.init_final(_key_of("final", key))

    def dtypes(self, part: str, params: Params, compute_dtype: str) -> Params:
        """The dtype in which passes take each parameter of one block, one depth of the tail or the final function.

        Raises:
            ValueError: :attr:`param_dtype` names another dtype than float32 and bfloat16.
        """

        def of(path: tuple, _: Any) -> jnp.dtype:
            name = "/".join([part, jax.tree_util.keystr(path, simple=True, separator="/")])
            own = self.param_dtype(name) if self.param_dtype else None
            dtype = jnp.dtype(compute_dtype if own is None else own)
            if dtype not in (jnp.float32, jnp.bfloat16):
                raise ValueError(f"param_dtype gives {dtype} for {name!r}; passes take float32 or bfloat16")
            return dtype

        return jax.tree_util.tree_map_with_path(of, params)

    def param_shapes(self) -> Params:
        """The canonical tree as :class:`jax.ShapeDtypeStruct` leaves; computes nothing."""
        one = replace(self, layers=1, layer_aux_inputs=self.layer_aux_inputs[:1])
        shapes = jax.eval_shape(lambda: one.init(jax.random.key(0, impl=_KEYS)))
        return shapes | {"blocks": shapes["blocks"] * self.layers}


_PARTS = ("blocks", "final", "tokens", "positions", "head", "tail")
_KEYS = "threefry2x32"  # of jax's generators the only one whose numbers are the same drawn alone, in a batch or sharded


def _key_of(part: str, key: jax.Array) -> jax.Array:
    """The key of a part of the model. Raises ValueError for a key of another implementation than threefry."""
    kind = str(jax.random.key_impl(key))
    if kind != _KEYS:
        raise ValueError(
            f"key is of the implementation {kind}, which gives every layout another model; "
            f"give jax.random.key(seed, impl={_KEYS!r})"
        )
    return jax.random.fold_in(key, _PARTS.index(part))
