"""How Hugging Face calls what our models are made of: ``config.json`` and the names of tensors, both ways.

An :class:`Architecture` is a table from the paths of the canonical tree to their names. Their linear layers are
``[out, in]`` and ours ``[in, out]``, GPT-2's excepted, which are like ours but order q, k and v before heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vocabpp_jax.models.config import Config, RopeScaling, RotaryConfig
from vocabpp_jax.models.gemma import GemmaConfig
from vocabpp_jax.models.gpt import NORM_EPSILON, GPTConfig
from vocabpp_jax.models.llama import LlamaConfig
from vocabpp_jax.models.qwen import QwenConfig
from vocabpp_jax.pipeline.weight_streaming import Path

Json = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """One of their model classes.

    Attributes:
        name, model_type: what ``config.json`` calls it.
        prefix: of every name but the head's; files of the model without its head leave it out.
        outer, inner: names by canonical path, joined by dots; ``inner`` within a layer, behind ``layers.N.``.
        layers: what stands before a layer's number.
        config, json: ``config.json`` to a configuration and back.
        transposed: whether linear layers are ``[out, in]``.
    """

    name: str
    model_type: str
    prefix: str
    layers: str
    outer: dict[str, str]
    inner: dict[str, str]
    config: Callable[[Json], Config]
    json: Callable[[Any], Json]
    transposed: bool = True

    def tensor(self, path: Path) -> str:
        """The name of a canonical leaf."""
        if path[0] == "blocks":
            return f"{self.prefix}{self.layers}.{path[1]}.{self.inner['.'.join(map(str, path[2:]))]}"
        name = self.outer[".".join(map(str, path))]
        return name if path == ("head",) else self.prefix + name

    def turned(self, path: Path) -> bool:
        """Whether a leaf's axes are theirs in reverse."""
        return self.transposed and path[-1] == "kernel"

    def reordered(self, path: Path) -> bool:
        """Whether a leaf's columns are theirs in another order."""
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


def _only(json: Json, **supported: Any) -> None:
    """Refuses a setting that our models do not have; one that is not given is as supported."""
    for key, value in supported.items():
        if key in json and json[key] not in (value if isinstance(value, tuple) else (value,)):
            raise ValueError(f"config.json has {key} {json[key]!r}; supported is {value!r}")


def _common(json: Json) -> Json:
    return {
        "tie_embeddings": json.get("tie_word_embeddings", False),
        "vocab_size": json["vocab_size"],
        "dtype": "bfloat16" if "bfloat16" in (json.get("dtype"), json.get("torch_dtype")) else "float32",
    }


def _rotary(json: Json) -> Json:
    """The fields that Llama, Qwen and Gemma share. Before version 5, rope_theta stood outside of its dictionary."""
    rope = json.get("rope_parameters") or json.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"config.json has rope_type {kind!r}; supported are 'default' and 'llama3'")
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return _common(json) | {
        "layers": json["num_hidden_layers"],
        "hidden": json["hidden_size"],
        "inner": json["intermediate_size"],
        "heads": json["num_attention_heads"],
        "kv_heads": json.get("num_key_value_heads") or json["num_attention_heads"],
        "head_size": json.get("head_dim") or json["hidden_size"] // json["num_attention_heads"],
        "seq": json["max_position_embeddings"],
        "norm_epsilon": json.get("rms_norm_eps", 1e-6),
        "rope_theta": float(rope.get("rope_theta", json.get("rope_theta", 10_000.0))),
        "rope_scaling": RopeScaling(*(rope[key] for key in keys)) if kind == "llama3" else None,
    }


def _rotary_json(config: RotaryConfig) -> Json:
    rope: Json = {"rope_type": "default", "rope_theta": config.rope_theta}
    if (scaling := config.rope_scaling) is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_seq,
        }
    return {
        "num_hidden_layers": config.layers,
        "hidden_size": config.hidden,
        "intermediate_size": config.inner,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": config.seq,
        "rms_norm_eps": config.norm_epsilon,
        "rope_parameters": rope,
        # For readers from before version 5.
        "rope_theta": config.rope_theta,
        "hidden_act": "silu",
    }


def _llama(json: Json) -> LlamaConfig:
    _only(json, hidden_act="silu", attention_bias=False, mlp_bias=False)
    return LlamaConfig(**_rotary(json))


def _qwen(generation: int, json: Json) -> QwenConfig:
    _only(json, hidden_act="silu", attention_bias=False, use_sliding_window=False)
    return QwenConfig(**_rotary(json), generation=generation)


def _gemma(json: Json) -> GemmaConfig:
    _only(json, hidden_activation=("gelu_pytorch_tanh", None), attention_bias=False)
    _only(json, use_bidirectional_attention=(None, False))
    _only(json, layer_types=[["sliding_attention", "full_attention"][n % 2] for n in range(json["num_hidden_layers"])])
    return GemmaConfig(
        **_rotary({"tie_word_embeddings": True} | json),
        query_scalar=json["query_pre_attn_scalar"],
        attention_cap=json["attn_logit_softcapping"],
        logit_cap=json["final_logit_softcapping"],
        window=json["sliding_window"],
    )


def _gemma_json(config: GemmaConfig) -> Json:
    return _rotary_json(config) | {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config.query_scalar,
        "attn_logit_softcapping": config.attention_cap,
        "final_logit_softcapping": config.logit_cap,
        "sliding_window": config.window,
    }


def _gpt2(json: Json) -> GPTConfig:
    _only(json, activation_function=("gelu_new", "gelu_pytorch_tanh"), layer_norm_epsilon=NORM_EPSILON)
    _only(json, scale_attn_by_inverse_layer_idx=False, scale_attn_weights=True, add_cross_attention=False)
    inner, hidden = json.get("n_inner") or 4 * json["n_embd"], json["n_embd"]
    if inner % hidden:
        raise ValueError(f"config.json has n_inner {inner}; it must be a multiple of n_embd, which is {hidden}")
    return GPTConfig(
        **_common({"tie_word_embeddings": True} | json),
        layers=json["n_layer"],
        hidden=hidden,
        heads=json["n_head"],
        seq=json["n_positions"],
        mlp_ratio=inner // hidden,
    )


def _gpt2_json(config: GPTConfig) -> Json:
    return {
        "n_layer": config.layers,
        "n_embd": config.hidden,
        "n_head": config.heads,
        "n_positions": config.seq,
        "n_inner": config.mlp_ratio * config.hidden,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": NORM_EPSILON,
    }


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
            "LlamaForCausalLM", "llama", "model.", "layers", _ROTARY_OUTER, _LLAMA_INNER, _llama, _rotary_json
        ),
        *(
            Architecture(
                f"Qwen{g}ForCausalLM", f"qwen{g}", "model.", "layers", _ROTARY_OUTER, _QWEN_INNER,
                lambda json, g=g: _qwen(g, json), _rotary_json,
            )
            for g in (2, 3)
        ),
        Architecture(
            "Gemma2ForCausalLM", "gemma2", "model.", "layers", _ROTARY_OUTER, _GEMMA_INNER, _gemma, _gemma_json
        ),
        Architecture(
            "GPT2LMHeadModel", "gpt2", "transformer.", "h", _GPT2_OUTER, _GPT2_INNER, _gpt2, _gpt2_json,
            transposed=False,
        ),
    )
}  # fmt: skip


def architecture_of(config: Config) -> Architecture:
    """Their architecture of a configuration of ours."""
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
