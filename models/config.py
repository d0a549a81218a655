"""What every architecture declares about itself, validated on construction."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar

import jax
from flax import nnx

from vocabpp_jax.pipeline.mesh import GPU_PLATFORMS
from vocabpp_jax.pipeline.model_interface import AuxInputs
from vocabpp_jax.vocab import Loss

_AUTO_CUDNN_HEAD = 128  # the widest head that cuDNN's flash attention supports on every GPU since Ampere
_MOST = {"layers": 1000}  # each layer is traced separately; sizes are at most what int32 can index
_MAX_CUDNN_HEAD = 256  # ... since Hopper


@dataclass(frozen=True, kw_only=True)
class Config:
    """A decoder of identical layers. Every field is validated here; an invalid one raises ValueError.

    An architecture is a subclass: its fields and its modules. Everything that differs between architectures is asked of
    the configuration; nothing tests for an architecture by name.
    """

    layers: int
    hidden: int
    heads: int
    seq: int
    """The training sequence length in tokens, which is also the maximum."""
    vocab_size: int
    tie_embeddings: bool = False
    dtype: str = "float32"
    """The compute dtype of forward and backward; master parameters are float32 either way."""
    attention: str = "auto"
    """``auto`` is ``cudnn`` on GPUs for bfloat16 heads that it supports, else ``xla``. A pipeline decides by its mesh's
    platform; without one, the default backend decides."""
    residuals: str = "selective"
    """What a block keeps for the backward: ``selective`` recomputes norms and activation functions but no matrix
    product, ``everything`` keeps everything and recomputes nothing, ``full`` keeps the block's input and recomputes all
    of it."""

    CHOICES: ClassVar[dict[str, tuple]] = {
        "dtype": ("float32", "bfloat16"),
        "attention": ("auto", "xla", "cudnn"),
        "residuals": ("selective", "everything", "full"),
    }

    def __post_init__(self) -> None:
        for field in fields(self):
            value, (kind, _, none) = getattr(self, field.name), field.type.partition(" | ")
            if none and value is None:
                continue
            if kind == "int" and (type(value) is not int or value < 1):
                raise ValueError(f"{field.name} is {value!r}; it must be a positive integer")
            if kind == "int" and value > (most := _MOST.get(field.name, 2**31 - 1)):
                raise ValueError(f"{field.name} is {value}; it must be at most {most}")
            if kind == "float" and not 0 < value < math.inf:
                raise ValueError(f"{field.name} is {value!r}; it must be above 0 and finite")
            if field.name in self.CHOICES and value not in self.CHOICES[field.name]:
                choices = ", ".join(map(str, self.CHOICES[field.name]))
                raise ValueError(f"{field.name} is {value!r}; it must be one of {choices}")
        self.check_heads()
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            raise ValueError(f"attention is 'cudnn' with dtype {self.dtype!r}; cuDNN needs bfloat16, or choose 'xla'")
        if self.attention == "cudnn" and (self.head_width % 8 or self.head_width > _MAX_CUDNN_HEAD):
            raise ValueError(
                f"attention is 'cudnn' with heads {self.head_width} wide; "
                f"cuDNN needs a multiple of 8 up to {_MAX_CUDNN_HEAD}, or choose 'xla'"
            )

    def check_heads(self) -> None:
        """Raise ValueError for head counts that do not fit."""
        if self.hidden % self.heads:
            raise ValueError(f"heads is {self.heads}; it must divide hidden, which is {self.hidden}")

    # --- what an architecture defines --------------------------------------------------------------------------------

    def block(self, rngs: nnx.Rngs, axis: str | None = None) -> nnx.Module:
        """One layer, a module ``(x [B, L, D], aux_inputs) -> x``.

        With ``axis``, it holds one device's part of the weights along that mesh axis, see
        :mod:`vocabpp_jax.pipeline.tensor`.
        """
        raise NotImplementedError

    def norm(self, rngs: nnx.Rngs) -> nnx.Module:
        """The norm before the head."""
        raise NotImplementedError

    @property
    def head_width(self) -> int:
        """K, the width of one attention head."""
        return self.hidden // self.heads

    @property
    def fits_cudnn(self) -> bool:
        """Whether cuDNN's flash attention can compute this attention on every GPU since Ampere."""
        return self.dtype == "bfloat16" and self.head_width % 8 == 0 and self.head_width <= _AUTO_CUDNN_HEAD

    @property
    def shared_heads(self) -> int:
        """The number of heads with their own keys and values: a tensor axis must divide it."""
        return self.heads

    @property
    def positions(self) -> int | None:
        """Rows of a learned position table; None if there is none."""
        return None

    @property
    def embed_scale(self) -> float:
        """Factor applied to the embedded input."""
        return 1.0

    @property
    def loss(self) -> Loss:
        """The architecture's loss."""
        return Loss()

    @property
    def layer_aux_inputs(self) -> tuple[AuxInputs, ...]:
        """Per-layer inputs that are not trained, see :class:`vocabpp_jax.pipeline.Model`."""
        return ()

    def span(self, layer: int) -> int:
        """Keys that a query of a layer can reach, with causal layers counted in full."""
        return self.seq

    @property
    def kept_width(self) -> int:
        """Elements per token that ``selective`` keeps of a layer, besides flash attention's softmax statistics."""
        raise NotImplementedError

    @property
    def init_std(self) -> float:
        """Standard deviation of initial weights, except those that write into the residual stream."""
        return 0.02

    @property
    def out_std(self) -> float:
        """Standard deviation of weights that write into the residual stream: lower, as layers write twice (GPT-2)."""
        return self.init_std / (2 * self.layers) ** 0.5


def attention_implementation(config: Config, platform: str | None = None) -> str:
    """``xla`` or ``cudnn``: what ``config.attention`` means on a platform, or on the default backend, which this
    initializes.

    Raises:
        ValueError: cuDNN was chosen for a ``platform`` other than GPUs.
    """
    if config.attention == "cudnn" and platform and platform not in GPU_PLATFORMS:
        raise ValueError(
            f"attention is 'cudnn', and the devices are of the platform {platform!r}; choose 'auto' or 'xla'"
        )
    if config.attention != "auto":
        return config.attention
    return "cudnn" if config.fits_cudnn and (platform or jax.default_backend()) in GPU_PLATFORMS else "xla"


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's rescaling of rotary wavelengths for lengths beyond the original training length."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_seq: int

    def __post_init__(self) -> None:
        if not (self.factor > 0 and 0 < self.low_freq_factor < self.high_freq_factor and self.original_seq > 0):
            raise ValueError(
                f"rope_scaling is {self}; its numbers must be above 0, and high_freq_factor above low_freq_factor"
            )


@dataclass(frozen=True, kw_only=True)
class RotaryConfig(Config):
    """A decoder with rotary positions, grouped-query attention, RMSNorm and a gated MLP."""

    kv_heads: int
    """Key/value heads, each shared by ``heads / kv_heads`` query heads."""
    head_size: int
    """K, the width of one head; ``heads * head_size`` need not equal the model's width."""
    inner: int
    """Width of the MLP."""
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_epsilon: float = 1e-5

    def check_heads(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads is {self.kv_heads}; it must divide heads, which is {self.heads}")
        if self.head_size % 2:
            raise ValueError(f"head_size is {self.head_size}; rotary positions need an even one")

    @property
    def head_width(self) -> int:
        return self.head_size

    @property
    def shared_heads(self) -> int:
        return self.kv_heads

    @property
    def kept_width(self) -> int:
        # Input, q, attention output, post-attention stream; k and v; the gate and what it multiplies.
        return 2 * self.hidden + 2 * (self.heads + self.kv_heads) * self.head_size + 2 * self.inner
