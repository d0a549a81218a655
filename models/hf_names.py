"""Hugging Face's names for our models: ``config.json`` and tensor names, in both directions.

An :class:`Architecture` is a table from paths of the canonical tree to their names. Their linear layers are ``[out,
in]`` and ours ``[in, out]``, except GPT-2's, which are laid out like ours but order q, k and v before heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vocabpp_jax.models import hf_configs
from vocabpp_jax.models.config import Config
from vocabpp_jax.models.gemma import GemmaConfig
from vocabpp_jax.models.gpt import GPTConfig
from vocabpp_jax.models.hf_configs import Json
from vocabpp_jax.models.hf_fields import Fields
from vocabpp_jax.models.llama import LlamaConfig
from vocabpp_jax.models.qwen import QwenConfig
from vocabpp_jax.pipeline.weight_streaming import Path


@dataclass(frozen=True)
class Architecture:
    """One of their model classes.

    Attributes:
        name, model_type: its names in ``config.json``.
        prefix: of every name except the head's; files saved without the head omit it.
        outer, inner: names by canonical path, joined by dots; ``inner`` within a layer, after ``layers.N.``.
        layers: the prefix of a layer's number.
        config, json: ``config.json`` to a configuration and back.
        transposed: whether linear layers are ``[out, in]``.
    """

    name: str
    model_type: str
    prefix: str
    layers: str
    outer: dict[str, str]
    inner: dict[str, str]
    config: Callable[[Fields], Config]
    json: Callable[[Any], Json]
    transposed: bool = True

    def tensor(self, path: Path) -> str:
        """The name of a canonical leaf."""
        if path[0] == "blocks":
            return f"{self.prefix}{self.layers}.{path[1]}.{self.inner['.'.join(map(str, path[2:]))]}"
        name = self.outer[".".join(map(str, path))]
        return name if path == ("head",) else self.prefix + name

    def is_transposed(self, path: Path) -> bool:
        """Whether a leaf's axes are in reverse order in their files."""
        return self.transposed and path[-1] == "kernel"

    def reordered(self, path: Path) -> bool:
        """Whether a leaf's columns are in another order in their files."""
        return "qkv" in path


def by_head(columns: np.ndarray, heads: int) -> np.ndarray:
    """GPT-2's ``[..., 3, H, K]`` columns as our ``[..., H, 3, K]``."""
    return _swapped(columns, 3, heads)


def by_kind(columns: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of :func:`by_head`."""
    return _swapped(columns, heads, 3)


def _swapped(x: np.ndarray, first: int, second: int) -> np.ndarray:
    parts = x.reshape(*x.shape[:-1], first, second, -1)
    return np.ascontiguousarray(np.swapaxes(parts, -3, -2).reshape(x.shape))


_ROTARY_OUTER = {"embed.tokens": "embed_tokens.weight", "final.scale": "norm.weight", "head": "lm_head.weight"}
_LLAMA_INNER = {
    "attention.norm.scale": "input_layernorm.weight",
    "attention.q.kernel": "self_attn.q_proj.weight",
    "attention.k.kernel": "self_attn.k_proj.weight",
    "attention.v.kernel": "self_attn.v_proj.weight",
    "attention.out.kernel": "self_attn.o_proj.weight",
    "mlp.norm.scale": "post_attention_layernorm.weight",
    "mlp.gate.kernel": "mlp.gate_proj.weight",
    "mlp.up.kernel": "mlp.up_proj.weight",
    "mlp.down.kernel": "mlp.down_proj.weight",
}
_QWEN_INNER = _LLAMA_INNER | {
    **{f"attention.{part}.bias": f"self_attn.{part}_proj.bias" for part in "qkv"},
    **{f"attention.{part}_norm.scale": f"self_attn.{part}_norm.weight" for part in "qk"},
}
_GEMMA_INNER = _LLAMA_INNER | {
    "after_attention.scale": "post_attention_layernorm.weight",
    "mlp.norm.scale": "pre_feedforward_layernorm.weight",
    "after_mlp.scale": "post_feedforward_layernorm.weight",
}
_GPT2_INNER = {
    f"{ours}.{leaf}": f"{theirs}.{'bias' if leaf == 'bias' else 'weight'}"
    for ours, theirs, leaves in [
        ("attention.norm", "ln_1", ("scale", "bias")),
        ("attention.qkv", "attn.c_attn", ("kernel", "bias")),
        ("attention.out", "attn.c_proj", ("kernel", "bias")),
        ("mlp.norm", "ln_2", ("scale", "bias")),
        ("mlp.up", "mlp.c_fc", ("kernel", "bias")),
        ("mlp.down", "mlp.c_proj", ("kernel", "bias")),
    ]
    for leaf in leaves
}
_GPT2_OUTER = {
    "embed.tokens": "wte.weight",
    "embed.positions": "wpe.weight",
    "final.scale": "ln_f.weight",
    "final.bias": "ln_f.bias",
    "head": "lm_head.weight",
}

ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture(
            "LlamaForCausalLM", "llama", "model.", "layers", _ROTARY_OUTER, _LLAMA_INNER,
            hf_configs.llama, hf_configs.rotary_json
        ),
        *(
            Architecture(
                f"Qwen{g}ForCausalLM", f"qwen{g}", "model.", "layers", _ROTARY_OUTER, _QWEN_INNER,
                lambda json, g=g: hf_configs.qwen(g, json), hf_configs.rotary_json,
            )
            for g in (2, 3)
        ),
        Architecture(
            "Gemma2ForCausalLM", "gemma2", "model.", "layers", _ROTARY_OUTER, _GEMMA_INNER,
            hf_configs.gemma, hf_configs.gemma_json
        ),
        Architecture(
            "GPT2LMHeadModel", "gpt2", "transformer.", "h", _GPT2_OUTER, _GPT2_INNER,
            hf_configs.gpt2, hf_configs.gpt2_json,
            transposed=False,
        ),
    )
}  # fmt: skip


def architecture_of(config: Config) -> Architecture:
    """Their architecture for one of our configurations."""
    match config:
        case QwenConfig():
            return ARCHITECTURES[f"Qwen{config.generation}ForCausalLM"]
        case LlamaConfig():
            return ARCHITECTURES["LlamaForCausalLM"]
        case GemmaConfig():
            return ARCHITECTURES["Gemma2ForCausalLM"]
        case GPTConfig():
            return ARCHITECTURES["GPT2LMHeadModel"]
    raise ValueError(f"{type(config).__name__} has no counterpart; there is one for each of {', '.join(ARCHITECTURES)}")


def config_of(values: Json, where: str = "config.json") -> tuple[Architecture, Config]:
    """The architecture and the configuration that a ``config.json`` describes.

    Raises:
        ValueError: an unsupported architecture or setting, or a field that is missing or of another type.
    """
    named = values.get("architectures") or [_BY_TYPE.get(str(values.get("model_type")))]
    name = named[0] if isinstance(named, list) else named
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(f"{where} has architecture {name!r}; it must be one of {', '.join(ARCHITECTURES)}")
    try:
        return ARCHITECTURES[name], ARCHITECTURES[name].config(Fields(values, where))
    except KeyError as missing:
        raise ValueError(f"{where} lacks the field {missing}, which a {name} has") from None


_BY_TYPE = {architecture.model_type: name for name, architecture in ARCHITECTURES.items()}
