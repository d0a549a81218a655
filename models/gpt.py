"""A GPT in Flax NNX, and the pure functions that the pipeline runs it by.

Shapes, all per device: B batch, L length, D model width, H heads, K head width (D = H K), V vocabulary.

A block is cut into small functions so that what its backward keeps is a choice (``GPTConfig.residuals``):

    q, k, v = norm + qkv linear (x)      kept: x, q, k, v         (the normed x is recomputed)
    a       = attention (q, k, v)        kept: a, and what the attention kernel keeps for itself
    x       = x + out linear (a)         kept: x
    u       = norm + up linear (x)       kept: u                  (the normed x is recomputed)
    x       = x + down linear (gelu(u))                           (the GELU is recomputed)

Each recomputed function holds one matrix product, so that a backward can be cut into an input-gradient half and a
weight-gradient half without repeating any.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vocabpp_jax.model import Model, Params, Side

INIT_STD = 0.02  # GPT-2
NORM_EPSILON = 1e-5

_CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "attention": ("auto", "xla", "cudnn"),
    "residuals": ("selective", "everything", "full"),
}
_AUTO_CUDNN_HEAD = 128  # the widest head that cuDNN's flash attention takes on every GPU since Ampere
_MAX_CUDNN_HEAD = 256  # ... since Hopper


@dataclass(frozen=True)
class GPTConfig:
    """What a GPT is made of. Every field is checked here; a wrong one raises ValueError."""

    layers: int
    hidden: int
    heads: int
    seq: int
    """Rows of the learned position table, the longest sequence in tokens."""
    vocab_size: int
    mlp_ratio: int = 4
    """Width of the MLP in units of ``hidden``."""
    tie_embeddings: bool = False
    dtype: str = "float32"
    """What the forward and backward compute in; master parameters are float32 either way."""
    attention: str = "auto"
    """``auto`` is ``cudnn`` for bfloat16 heads that it takes when the default backend is a GPU, else ``xla``."""
    residuals: str = "selective"
    """What the backward keeps of a block: ``selective`` recomputes norms and GELU and no matrix product,
    ``everything`` recomputes nothing, ``full`` keeps the block's input and recomputes all of it."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (type(value) is not int or value < 1):
                raise ValueError(f"{field.name} is {value!r}; it must be a positive integer")
            if field.name in _CHOICES and value not in _CHOICES[field.name]:
                raise ValueError(f"{field.name} is {value!r}; it must be one of {', '.join(_CHOICES[field.name])}")
        if self.hidden % self.heads:
            raise ValueError(f"heads is {self.heads}; it must divide hidden, which is {self.hidden}")
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            raise ValueError(f"attention is 'cudnn' with dtype {self.dtype!r}; cuDNN needs bfloat16, or choose 'xla'")
        if self.attention == "cudnn" and (self.head_width % 8 or self.head_width > _MAX_CUDNN_HEAD):
            raise ValueError(
                f"attention is 'cudnn' with heads {self.head_width} wide (hidden / heads); "
                f"cuDNN needs a multiple of 8 up to {_MAX_CUDNN_HEAD}, or choose 'xla'"
            )

    @property
    def head_width(self) -> int:
        """K, the width of one attention head."""
        return self.hidden // self.heads


def attention_implementation(config: GPTConfig) -> str:
    """``xla`` or ``cudnn``: what ``config.attention`` means for the default backend, which this initialises."""
    if config.attention != "auto":
        return config.attention
    fits = config.dtype == "bfloat16" and config.head_width % 8 == 0 and config.head_width <= _AUTO_CUDNN_HEAD
    return "cudnn" if fits and jax.default_backend() == "gpu" else "xla"


def _recomputed(function: Callable) -> Callable:
    # prevent_cse=False: forward and backward run as separate passes, so there is nothing for CSE to merge, and the
    # barriers that would prevent it also prevent fusion.
    return jax.checkpoint(function, prevent_cse=False)


def _cheap(config: GPTConfig, function: Callable) -> Callable:
    """A function of one matrix product: under ``selective`` its inputs are kept, not what it computes on the way."""
    return _recomputed(function) if config.residuals == "selective" else function


def _norm_linear(norm: nnx.LayerNorm, linear: nnx.Linear, x_BLD: jax.Array) -> jax.Array:
    return linear(norm(x_BLD))


def _norm_qkv(heads: int, norm: nnx.LayerNorm, qkv: nnx.Linear, x_BLD: jax.Array) -> tuple[jax.Array, ...]:
    # Split in here, so that q, k and v are kept once, in the form in which attention takes them.
    B, L, D = x_BLD.shape
    qkv_BL3HK = _norm_linear(norm, qkv, x_BLD).reshape(B, L, 3, heads, D // heads)
    return tuple(qkv_BL3HK[:, :, i] for i in range(3))


def _merged_heads_linear(out: nnx.Linear, a_BLHK: jax.Array) -> jax.Array:
    # Reshaped in here, or the attention output would be kept twice: as attention's own residual and reshaped.
    B, L, H, K = a_BLHK.shape
    return out(a_BLHK.reshape(B, L, H * K))


def _gelu_linear(linear: nnx.Linear, u: jax.Array) -> jax.Array:
    return linear(nnx.gelu(u, approximate=True))


def _same_document(side: Side) -> jax.Array | None:
    """The mask ``[B, 1, L, L]`` that keeps attention inside documents, or None where a row is one document."""
    if "segment_ids" not in side:
        return None
    ids_BL = side["segment_ids"]
    return ids_BL[:, None, :, None] == ids_BL[:, None, None, :]


def _layer_norm(width: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # Flax computes the statistics in float32 whatever the input; the fast variance E[x²] - E[x]² would cancel there.
    return nnx.LayerNorm(width, epsilon=NORM_EPSILON, use_fast_variance=False, rngs=rngs)


def _linear(width_in: int, width_out: int, std: float, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(width_in, width_out, kernel_init=nnx.initializers.normal(std), rngs=rngs)


class Attention(nnx.Module):
    """The attention branch of a block: ``(x [B, L, D], side) -> [B, L, D]``, norm included, residual add not."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        D = config.hidden
        self.config = config
        self.norm = _layer_norm(D, rngs)
        self.qkv = _linear(D, 3 * D, INIT_STD, rngs)
        self.out = _linear(D, D, INIT_STD / math.sqrt(2 * config.layers), rngs)

    def __call__(self, x_BLD: jax.Array, side: Side) -> jax.Array:
        q, k, v = _cheap(self.config, functools.partial(_norm_qkv, self.config.heads))(self.norm, self.qkv, x_BLD)
        implementation = attention_implementation(self.config)
        mask = _same_document(side)
        a_BLHK = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation=implementation)
        return _cheap(self.config, _merged_heads_linear)(self.out, a_BLHK)


class MLP(nnx.Module):
    """The MLP branch of a block: ``x [B, L, D] -> [B, L, D]``, norm included, residual add not."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        D, inner = config.hidden, config.mlp_ratio * config.hidden
        self.config = config
        self.norm = _layer_norm(D, rngs)
        self.up = _linear(D, inner, INIT_STD, rngs)
        self.down = _linear(inner, D, INIT_STD / math.sqrt(2 * config.layers), rngs)

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        u = _cheap(self.config, _norm_linear)(self.norm, self.up, x_BLD)
        return _cheap(self.config, _gelu_linear)(self.down, u)


class Block(nnx.Module):
    """One pre-norm layer: ``(x [B, L, D], side) -> [B, L, D]``.

    ``side["segment_ids"]`` ``[B, L]``, where present, numbers the documents packed into a row; attention stays inside
    a document. No weight is cast in here: parameters and ``x`` share one dtype, which is the result's. A cast would be
    kept for the backward, once per layer and microbatch.
    """

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.attention = Attention(config, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)

    def _layer(self, x_BLD: jax.Array, side: Side) -> jax.Array:
        x_BLD = x_BLD + self.attention(x_BLD, side)
        return x_BLD + self.mlp(x_BLD)

    def __call__(self, x_BLD: jax.Array, side: Side | None = None) -> jax.Array:
        layer = _recomputed(Block._layer) if self.config.residuals == "full" else Block._layer
        return layer(self, x_BLD, side or {})


class GPT(nnx.Module):
    """The whole model, for use without a pipeline: ``tokens [B, L] -> logits [B, L, V]`` in float32.

    Parameters are float32 and cast to ``config.dtype`` once per call. They exchange with pipelines and checkpoints
    as :meth:`canonical` and :meth:`from_canonical`.
    """

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(INIT_STD)
        self.config = config
        self.tokens = nnx.Param(normal(rngs.params(), (config.vocab_size, config.hidden)))
        self.positions = nnx.Param(normal(rngs.params(), (config.seq, config.hidden)))
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.layers)])
        self.final = _layer_norm(config.hidden, rngs)
        if not config.tie_embeddings:
            self.head = nnx.Param(normal(rngs.params(), (config.vocab_size, config.hidden)))

    def __call__(self, tokens_BL: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """Logits; raises ValueError where L exceeds ``config.seq``. ``segment_ids [B, L]`` as in :class:`Block`."""
        L = tokens_BL.shape[1]
        if L > self.config.seq:
            raise ValueError(f"tokens are {L} long; seq, the longest this model takes, is {self.config.seq}")
        cast = jax.tree.map(lambda array: array.astype(self.config.dtype), self)
        x_BLD = cast.tokens[...][tokens_BL] + cast.positions[:L]
        for block in cast.blocks:
            x_BLD = block(x_BLD, {} if segment_ids is None else {"segment_ids": segment_ids})
        head_VD = cast.tokens[...] if self.config.tie_embeddings else cast.head[...]
        return jnp.einsum("BLD,VD->BLV", cast.final(x_BLD), head_VD, preferred_element_type=jnp.float32)

    def canonical(self) -> Params:
        """The canonical parameters, see :class:`vocabpp_jax.model.Model`."""
        state = nnx.to_pure_dict(nnx.state(self))
        params = {
            "embed": {"tokens": state["tokens"], "positions": state["positions"]},
            "blocks": tuple(state["blocks"][i] for i in range(self.config.layers)),
            "final": state["final"],
        }
        return params if self.config.tie_embeddings else {**params, "head": state["head"]}

    @classmethod
    def from_canonical(cls, config: GPTConfig, params: Params) -> GPT:
        """The model that holds canonical parameters; copies nothing."""
        state = {**params["embed"], "blocks": dict(enumerate(params["blocks"])), "final": params["final"]}
        if not config.tie_embeddings:
            state["head"] = params["head"]
        return nnx.merge(_graphdef(cls, config), state)


def _graphdef(module: type[nnx.Module], config: GPTConfig) -> Any:
    """The static half of a module, made without computing anything."""
    return nnx.graphdef(nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0))))


def gpt(config: GPTConfig) -> Model:
    """The model as the pipeline sees it. ``block`` and ``final`` take parameters in the dtype of ``x``.

    Block parameters are the nested dict of a :class:`Block`: ``attention`` has ``norm``, ``qkv`` and ``out``, ``mlp``
    has ``norm``, ``up`` and ``down``; a norm has ``scale`` and ``bias [D]``, a linear ``kernel [in, out]`` and
    ``bias [out]``. ``final`` is a norm.
    """
    graphdef = _graphdef(Block, config)

    def block(params: Params, x_BLD: jax.Array, side: Side) -> jax.Array:
        return nnx.merge(graphdef, params)(x_BLD, side)

    norm_graphdef = nnx.graphdef(nnx.eval_shape(lambda: _layer_norm(config.hidden, nnx.Rngs(0))))

    def final(params: Params, x_BLD: jax.Array) -> jax.Array:
        return nnx.merge(norm_graphdef, params)(x_BLD)

    def init(key: jax.Array) -> Params:
        return GPT(config, rngs=nnx.Rngs(key)).canonical()

    return Model(
        layers=config.layers,
        vocab_size=config.vocab_size,
        width=config.hidden,
        block=block,
        init=init,
        final=final,
        positions=config.seq,
        tied=config.tie_embeddings,
    )
