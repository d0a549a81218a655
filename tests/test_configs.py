"""Configurations as they are in the wild: what means the same is read, the rest refused in a sentence."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from test_weights import CONFIGS, assert_same_bits, weights

from vocabpp_jax import models
from vocabpp_jax.models import huggingface
from vocabpp_jax.models.hf_names import config_of


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The values of config.json by architecture."""
    folder, found = tmp_path_factory.mktemp("configs"), {}
    for name, config in CONFIGS.items():
        huggingface.save(folder / name, config, weights(config))
        found[name] = json.loads((folder / name / "config.json").read_text())
    return found


def read(values):
    return config_of(json.loads(json.dumps(values)))[1]


@pytest.mark.parametrize("cap", [None, 0, 0.0])
def test_gemma_without_caps_has_none(written, cap):
    config = read(written["gemma2"] | {"attn_logit_softcapping": cap, "final_logit_softcapping": cap})
    assert config.attention_cap is None and config.logit_cap is None and config.loss.soft_cap is None


def test_gemma_with_nothing_said_is_as_published(written):
    values = {name: value for name, value in written["gemma2"].items() if "softcapping" not in name}
    del values["sliding_window"]
    assert (read(values).attention_cap, read(values).logit_cap, read(values).window) == (50.0, 30.0, 4096)


def logits(config, params):
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, config.vocab_size, (2, config.seq)))
    return jax.jit(lambda p: models.reference_logits(models.build(config), p, tokens, {}))(params)


def test_gemma_without_caps_and_window_computes_what_wide_ones_leave(written):
    params = weights(CONFIGS["gemma2"])
    none = written["gemma2"] | {"attn_logit_softcapping": None, "final_logit_softcapping": 0, "sliding_window": None}
    wide = written["gemma2"] | {
        "attn_logit_softcapping": 1e5,
        "final_logit_softcapping": 1e5,
        "sliding_window": 10**6,
    }
    np.testing.assert_allclose(logits(read(none), params), logits(read(wide), params), rtol=1e-4, atol=1e-4)
    assert not np.allclose(logits(read(none), params), logits(CONFIGS["gemma2"], params), rtol=1e-2)


def test_an_unwindowed_gemma_is_exported_as_one(written, tmp_path):
    config = read(written["gemma2"] | {"sliding_window": None, "final_logit_softcapping": None})
    huggingface.save(tmp_path / "out", config, weights(config))
    assert huggingface.load_config(tmp_path / "out") == config


@pytest.mark.parametrize("name", CONFIGS)
def test_whole_numbers_may_be_written_as_floats_and_what_is_null_is_as_if_absent(written, name):
    values = written[name]
    floats = {k: float(v) if type(v) is int else v for k, v in values.items()}
    assert read(floats) == CONFIGS[name]
    nulls = values | dict.fromkeys(
        ("attention_bias", "mlp_bias", "hidden_act", "layer_types", "torch_dtype", "n_inner")
    )
    if name != "gpt2-untied":
        assert read(nulls) == CONFIGS[name]


def test_a_null_rope_theta_is_the_default(written):
    values = written["llama"] | {"rope_theta": None, "rope_parameters": None}
    assert read(values).rope_theta == 10_000.0
    assert read(values | {"rope_scaling": {"type": "linear", "factor": 1.0}}).rope_scaling is None


def test_other_names_of_the_same_functions_are_read(written):
    assert read(written["llama"] | {"hidden_act": "swish"}) == CONFIGS["llama"]
    assert read(written["gpt2"] | {"activation_function": "gelu_fast"}) == CONFIGS["gpt2"]


def test_an_architecture_may_be_named_by_its_type_alone(written):
    for missing in ([], None):
        assert read(written["qwen3"] | {"architectures": missing}) == CONFIGS["qwen3"]


@pytest.mark.parametrize(
    ("name", "field", "value", "sentence"),
    [
        ("llama", "hidden_size", "16", "config.json has hidden_size '16'; it must be a whole number"),
        ("llama", "hidden_size", 16.5, "config.json has hidden_size 16.5; it must be a whole number"),
        ("llama", "hidden_size", True, "config.json has hidden_size True; it must be a whole number"),
        ("llama", "hidden_size", None, "config.json lacks the field 'hidden_size'"),
        ("llama", "hidden_size", -16, "hidden is -16; it must be a positive integer"),
        ("llama", "num_attention_heads", 0, "heads is 0; it must be a positive integer"),
        ("llama", "rms_norm_eps", float("nan"), "config.json has rms_norm_eps nan; it must be a number"),
        ("llama", "rms_norm_eps", 10**400, "it must be a number"),
        ("llama", "rope_scaling", [1], "config.json has rope_scaling [1]; it must be an object"),
        ("llama", "rope_scaling", {"rope_type": 3}, "rope_scaling in config.json has rope_type 3; it must be a string"),
        ("llama", "rope_scaling", {"rope_type": "llama3", "factor": 8.0}, "lacks the field 'low_freq_factor'"),
        ("llama", "partial_rotary_factor", 0.5, "config.json has partial_rotary_factor 0.5; supported is 1.0"),
        ("llama-3.1", "rope_scaling", {"rope_type": "linear", "factor": 2}, "rope_type 'linear'; supported are"),
        ("qwen3", "layer_types", ["sliding_attention"] * 4, "has layer_types"),
        ("gemma2", "attn_logit_softcapping", -1, "attention_cap is -1.0; it must be above 0"),
        ("gemma2", "sliding_window", 0, "window is 0; it must be a positive integer"),
        ("gemma2", "tie_word_embeddings", "yes", "tie_word_embeddings 'yes'; it must be true or false"),
        ("gpt2", "n_inner", 17, "n_inner 17; it must be a multiple of n_embd"),
        ("gpt2", "architectures", "GPT2Model", "has architecture 'GPT2Model'; it must be one of"),
        ("gpt2", "architectures", [["x"]], "has architecture ['x']; it must be one of"),
    ],
)
def test_what_means_something_else_is_refused_in_a_sentence(written, name, field, value, sentence):
    with pytest.raises(ValueError) as problem:
        read(written[name] | {field: value})
    assert sentence in str(problem.value) and "\n" not in str(problem.value)


@pytest.mark.parametrize("raw", [b"[]", b'"text"', b"3", b"{", b"", b"\xff\xfe{", b"[" * 100_000])
def test_a_file_that_is_no_json_object_is_refused(tmp_path, raw):
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(ValueError, match=r"config\.json (is not JSON|holds a \w+; it must be a JSON object)"):
        huggingface.load_config(tmp_path)


def test_a_byte_order_mark_is_no_part_of_a_configuration(written, tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(written["llama"]).encode())
    assert huggingface.load_config(tmp_path) == CONFIGS["llama"]


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.float32])
def test_gpt2s_stored_masks_are_left_alone_whatever_their_dtype(tmp_path, dtype):
    params = weights(CONFIGS["gpt2"])
    huggingface.save(tmp_path / "gpt2", CONFIGS["gpt2"], params)
    tensors = load_file(tmp_path / "gpt2" / "model.safetensors")
    for n in range(4):
        tensors[f"transformer.h.{n}.attn.bias"] = np.tril(np.ones((1, 1, 8, 8), dtype))
        tensors[f"transformer.h.{n}.attn.masked_bias"] = np.array(-1e4, np.float32)
    save_file(tensors, tmp_path / "gpt2" / "model.safetensors")
    assert_same_bits(huggingface.load_canonical(tmp_path / "gpt2")[1], params)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(sorted(CONFIGS)), st.data())
def test_any_value_in_any_field_is_read_or_refused_in_a_sentence(written, name, data):
    values = written[name]
    changed = data.draw(st.dictionaries(st.sampled_from(sorted(values)), JSON, max_size=3))
    try:
        config_of(values | changed)
    except ValueError as problem:
        assert "\n" not in str(problem)
