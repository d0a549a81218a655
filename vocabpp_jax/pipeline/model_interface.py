"""What the pipeline asks of a model: a few pure functions and one canonical tree of parameters.

The executor, the layouts and the vocabulary layers see a model only through :class:`Model`. Flax, or any other
library, stays behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from ..vocab import Loss

Params = Any  # a pytree of arrays
Side = dict[str, jax.Array]  # per-microbatch arrays that no gradient flows into, e.g. segment ids


def _identity(params: Params, x: jax.Array) -> jax.Array:
    return x


@dataclass(frozen=True)
class TensorSplit:
    """How blocks are spread over the mesh axis ``tensor``; see :mod:`vocabpp_jax.pipeline.tensor`."""

    block: Callable[[Params, jax.Array, Side], jax.Array]
    """A block for one device's part of its parameters, with the sums over the axis in it."""
    specs: Params
    """A tree like a block's parameters, of PartitionSpecs that name the axis where a parameter is split."""
    parts: int
    """The axis must divide this (heads, where whole heads go to devices)."""


@dataclass(frozen=True, eq=False)  # compared and hashed by identity, as its functions are
class Model:
    """A decoder as a pipeline sees it: embedding, ``layers`` equal blocks, a final function, an LM head.

    Canonical parameters, which :attr:`init` makes and checkpoints hold, are the tree::

        {"embed":  {"tokens": [V, D], "positions": [L, D]},   # "positions" only where `positions` is set
         "blocks": (block_0, ..., block_{layers-1}),           # equal structures and shapes, in depth order
         "final":  ...,                                        # whatever `final` takes, may be {}
         "head":   [V, D]}                                     # absent where `tied`

    Shapes: B batch, L length, D model width, V vocabulary.
    """

    layers: int
    vocab_size: int
    width: int
    block: Callable[[Params, jax.Array, Side], jax.Array]
    """One layer: ``(block_params, x [B, L, D], side) -> x [B, L, D]``, pure, same dtype out as in."""
    init: Callable[[jax.Array], Params]
    """``(key) -> canonical parameters`` in float32."""
    final: Callable[[Params, jax.Array], jax.Array] = _identity
    """What stands between the last block and the head, usually a norm: ``(final_params, x) -> x``."""
    positions: int | None = None
    """Rows of a learned position table, or None without one."""
    tied: bool = False
    """The head is the token embedding."""
    embed_scale: float = 1.0
    """Factor on the embedded input (Gemma: the square root of the width)."""
    loss: Loss = Loss()
    """What is minimised: plain cross entropy, or with a soft cap, a z-loss, smoothed labels."""
    layer_side: tuple[Side, ...] = ()
    """What differs between layers and is not trained, one dictionary of arrays a layer with equal names and shapes,
    or none: a block finds its own among ``side``. Gemma 2's local and global layers differ by such a number."""
    tensor: TensorSplit | None = None
    """How blocks run on a mesh with an axis ``tensor``, or None if they cannot."""

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ValueError(f"layers is {self.layers}; a model needs at least 1")
        if self.vocab_size < 2:
            raise ValueError(f"vocab_size is {self.vocab_size}; a vocabulary needs at least 2 tokens")
        if self.layer_side and len(self.layer_side) != self.layers:
            raise ValueError(
                f"layer_side has {len(self.layer_side)} entries; it takes one for each of {self.layers} layers"
            )

    def param_shapes(self) -> Params:
        """The canonical tree as :class:`jax.ShapeDtypeStruct` leaves; computes nothing."""
        return jax.eval_shape(lambda: self.init(jax.random.key(0)))
