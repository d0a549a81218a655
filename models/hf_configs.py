"""Convert ``config.json`` to our configurations and back."""

from __future__ import annotations

from typing import Any

from vocabpp_jax.models.config import RopeScaling, RotaryConfig
from vocabpp_jax.models.gemma import GemmaConfig
from vocabpp_jax.models.gpt import NORM_EPSILON, GPTConfig
from vocabpp_jax.models.hf_fields import Fields
from vocabpp_jax.models.llama import LlamaConfig
from vocabpp_jax.models.qwen import QwenConfig

Json = dict[str, Any]


def _common(json: Fields, tied: bool = False) -> Json:
    return {
        "tie_embeddings": json.flag("tie_word_embeddings", tied),
        "vocab_size": json.integer("vocab_size"),
        "dtype": "bfloat16" if "bfloat16" in (json.text("dtype", None), json.text("torch_dtype", None)) else "float32",
    }


def _rotary(json: Fields, tied: bool = False) -> Json:
    """The fields that Llama, Qwen and Gemma share."""
    heads, hidden = json.integer("num_attention_heads"), json.integer("hidden_size")
    theta, scaling = _rope(json)
    return _common(json, tied) | {
        "layers": json.integer("num_hidden_layers"),
        "hidden": hidden,
        "inner": json.integer("intermediate_size"),
        "heads": heads,
        "kv_heads": json.integer("num_key_value_heads", heads),
        "head_size": json.integer("head_dim", None) or hidden // max(1, heads),
        "seq": json.integer("max_position_embeddings"),
        "norm_epsilon": float(json.number("rms_norm_eps", 1e-6)),
        "rope_theta": theta,
        "rope_scaling": scaling,
    }


def _rope(json: Fields) -> tuple[float, RopeScaling | None]:
    """Rotary scaling, from either of its two places.

    Before version 5, rope_theta stood next to ``rope_scaling``; since then both are in ``rope_parameters``, but a
    ``rope_scaling`` that is also present takes precedence.
    """
    json.only(partial_rotary_factor=1.0)
    rope = json.fields("rope_scaling") or json.fields("rope_parameters") or Fields({}, json.where)
    rope.only(partial_rotary_factor=1.0)
    base = (rope, json.fields("rope_parameters") or rope, json)
    theta = next((found for fields in base if (found := fields.number("rope_theta", None)) is not None), 10_000.0)
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind == "linear" and rope.number("factor") == 1:
        kind = "default"
    if kind not in ("default", "llama3"):
        raise ValueError(f"{json.where} has rope_type {kind!r}; supported are 'default' and 'llama3'")
    scaling = kind == "llama3" and RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_seq=rope.integer("original_max_position_embeddings"),
    )
    return float(theta), scaling or None


def rotary_json(config: RotaryConfig) -> Json:
    scaling = config.rope_scaling
    stretched = scaling and {
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
        "rope_parameters": (stretched or {"rope_type": "default"}) | {"rope_theta": config.rope_theta},
        # For readers from before version 5.
        "rope_theta": config.rope_theta,
        "rope_scaling": stretched,
        "hidden_act": "silu",
    }


def llama(json: Fields) -> LlamaConfig:
    json.only(hidden_act=("silu", "swish"), attention_bias=False, mlp_bias=False)
    return LlamaConfig(**_rotary(json))


def qwen(generation: int, json: Fields) -> QwenConfig:
    json.only(hidden_act=("silu", "swish"), attention_bias=False, use_sliding_window=False)
    config = QwenConfig(**_rotary(json), generation=generation)
    json.only(layer_types=["full_attention"] * config.layers)
    return config


def gemma(json: Fields) -> GemmaConfig:
    json.only(hidden_activation="gelu_pytorch_tanh", attention_bias=False, use_bidirectional_attention=False)
    config = GemmaConfig(
        **_rotary(json, tied=True),
        query_scalar=json.integer("query_pre_attn_scalar", 256),
        attention_cap=_cap(json, "attn_logit_softcapping", 50.0),
        logit_cap=_cap(json, "final_logit_softcapping", 30.0),
        window=json.integer("sliding_window", None) if json.has("sliding_window") else 4096,
    )
    json.only(layer_types=[["sliding_attention", "full_attention"][n % 2] for n in range(config.layers)])
    return config


def _cap(json: Fields, name: str, absent: float) -> float | None:
    """A soft cap: null and 0 mean none; absent means the published models' value."""
    return float(json.number(name, 0)) or None if json.has(name) else absent


def gemma_json(config: GemmaConfig) -> Json:
    return rotary_json(config) | {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config.query_scalar,
        "attn_logit_softcapping": config.attention_cap,
        "final_logit_softcapping": config.logit_cap,
        "sliding_window": config.window,
    }


def gpt2(json: Fields) -> GPTConfig:
    json.only(activation_function=("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), layer_norm_epsilon=NORM_EPSILON)
    json.only(scale_attn_by_inverse_layer_idx=False, scale_attn_weights=True, add_cross_attention=False)
    hidden = json.integer("n_embd")
    inner = json.integer("n_inner", None) or 4 * hidden
    if hidden > 0 and inner % hidden:
        raise ValueError(f"{json.where} has n_inner {inner}; it must be a multiple of n_embd, which is {hidden}")
    return GPTConfig(
        **_common(json, tied=True),
        layers=json.integer("n_layer"),
        hidden=hidden,
        heads=json.integer("n_head"),
        seq=json.integer("n_positions"),
        mlp_ratio=inner // max(1, hidden),
    )


def gpt2_json(config: GPTConfig) -> Json:
    return {
        "n_layer": config.layers,
        "n_embd": config.hidden,
        "n_head": config.heads,
        "n_positions": config.seq,
        "n_inner": config.mlp_ratio * config.hidden,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": NORM_EPSILON,
    }
