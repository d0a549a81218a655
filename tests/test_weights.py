"""Weights in and out: the same bits in every layout, names and shapes checked before anything is read."""

import dataclasses
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from vocabpp_jax import Pipeline, make_mesh, models, schedules
from vocabpp_jax.models import huggingface
from vocabpp_jax.pipeline.weight_streaming import canonical_leaves

SMALL = dict(layers=4, hidden=16, heads=4, seq=8, vocab_size=37)
ROTARY = SMALL | dict(kv_heads=2, head_size=6, inner=20)
CONFIGS = {
    "gpt2": models.GPTConfig(**SMALL, tie_embeddings=True),
    "gpt2-untied": models.GPTConfig(**SMALL, mlp_ratio=2),
    "llama": models.LlamaConfig(**ROTARY),
    "llama-3.1": dataclasses.replace(models.SIZES["llama-3.1-8b"], **ROTARY, dtype="float32"),
    "qwen2": models.QwenConfig(**ROTARY, generation=2, tie_embeddings=True),
    "qwen3": models.QwenConfig(**ROTARY, generation=3),
    "gemma2": models.GemmaConfig(**ROTARY, window=4, query_scalar=9),
}


def weights(config, seed=0):
    random = np.random.default_rng(seed)
    shapes = models.build(config).param_shapes()
    return jax.tree.map(lambda s: random.normal(size=s.shape).astype(np.float32), shapes)


def assert_same_bits(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.fixture
def folder(tmp_path):
    huggingface.save(tmp_path / "llama", CONFIGS["llama"], weights(CONFIGS["llama"]))
    return tmp_path / "llama"


def edited(folder, change):
    """The folder's one file, with its tensors changed."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_export_then_import_is_bit_exact_and_gives_the_configuration_back(name, tmp_path):
    config, params = CONFIGS[name], weights(CONFIGS[name])
    huggingface.save(tmp_path / "there", config, params)
    again, loaded = huggingface.load_canonical(tmp_path / "there")
    assert again == config
    assert_same_bits(loaded, params)


@pytest.mark.parametrize(
    ("name", "schedule", "method", "p"),
    [
        ("gpt2", "1f1b", "vocab-2", 4),
        ("gpt2", "1f1b", "baseline", 2),
        ("gpt2-untied", "v-half", "baseline", 2),
        ("gemma2", "v-half", "vocab-1", 2),
        ("llama", "1f1b", "baseline", 3),
    ],
)
def test_weights_go_straight_into_a_layout_and_straight_out_of_it(name, schedule, method, p, tmp_path):
    config, params = CONFIGS[name], weights(CONFIGS[name])
    pipe = Pipeline(
        models.build(config), schedules.build(schedule, method, p=p, m=2), make_mesh(p, 1, jax.devices()[:p])
    )
    huggingface.save(tmp_path / "in", config, params, shard_bytes=4000)
    assert len(list((tmp_path / "in").glob("model-*-of-*.safetensors"))) > 3
    loaded = huggingface.load(tmp_path / "in", pipe)
    assert_same_bits(loaded, pipe.layout.pack(params))
    assert jax.tree.all(jax.tree.map(lambda a, s: a.sharding == s, loaded, pipe.shardings))
    huggingface.save(tmp_path / "out", config, loaded, pipe)
    assert_same_bits(huggingface.load_canonical(tmp_path / "out")[1], params)


def test_reading_asks_for_one_device_s_part_at_a_time(folder, monkeypatch):
    asked = []
    read = huggingface.Tensors.read

    def counted(self, name, index):
        part = read(self, name, index)
        asked.append(part.size)
        return part

    monkeypatch.setattr(huggingface.Tensors, "read", counted)
    pipe = Pipeline(
        models.build(CONFIGS["llama"]), schedules.build("1f1b", "vocab-2", p=4, m=2), make_mesh(4, 1, jax.devices()[:4])
    )
    huggingface.load(folder, pipe)
    assert max(asked) == 24 * 16  # one matrix of one layer; of the tables, 37 x 16, a device's rows


def test_canonical_leaves_come_one_by_one_in_the_order_of_the_tree():
    config = CONFIGS["gpt2"]
    pipe = Pipeline(
        models.build(config), schedules.build("1f1b", "vocab-2", p=2, m=2), make_mesh(2, 1, jax.devices()[:2])
    )
    params = weights(config)
    leaves = [leaf for _, leaf in canonical_leaves(pipe.layout, pipe.shard(params))]
    for got, want in zip(leaves, jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(got, want)


def test_sixteen_bit_weights_come_back_as_they_were(tmp_path):
    config, params = CONFIGS["llama"], weights(CONFIGS["llama"])
    huggingface.save(tmp_path / "half", config, params, dtype="bfloat16")
    again, loaded = huggingface.load_canonical(tmp_path / "half")
    assert again == dataclasses.replace(config, dtype="bfloat16")
    assert_same_bits(loaded, jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(np.float32), params))


def test_a_gpt2_without_prefix_and_with_stored_masks_loads(tmp_path):
    params = weights(CONFIGS["gpt2"])
    huggingface.save(tmp_path / "gpt2", CONFIGS["gpt2"], params)

    def older(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.ones((1, 1, 8, 8), np.float32)

    assert_same_bits(huggingface.load_canonical(edited(tmp_path / "gpt2", older))[1], params)


# --- what is refused, before anything is read -----------------------------------------------------------------------


def refuse_to_read(monkeypatch):
    monkeypatch.setattr(huggingface.Tensors, "read", lambda *_: pytest.fail("a weight was read"))


Q = "model.layers.2.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(Q), [Q, "[24, 16]", "no tensor"]),
        (lambda t: t.update({Q: np.zeros((24, 15), np.float32)}), [Q, "[24, 15]", "[24, 16]"]),
        (lambda t: t.update({Q: np.zeros((16, 24), np.float32)}), [Q, "[16, 24]", "[24, 16]"]),
        (lambda t: t.update({"adapter.weight": np.zeros((2, 3), np.float32)}), ["'adapter.weight'", "[2, 3]"]),
        (lambda t: t.update({Q: np.zeros((24, 16), np.int8)}), [Q, "I8", "F32, F16, BF16"]),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused_by_name_and_shapes(folder, monkeypatch, change, said):
    refuse_to_read(monkeypatch)
    with pytest.raises(ValueError) as error:
        huggingface.load_canonical(edited(folder, change))
    assert all(words in str(error.value) for words in said), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("left", [0, 4, 100, -1, -5000])
def test_a_truncated_file_is_refused_with_the_tensor_that_is_cut(folder, monkeypatch, left):
    refuse_to_read(monkeypatch)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:left] if left else b"")
    with pytest.raises(ValueError) as error:
        huggingface.load_canonical(folder)
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    said = ["truncated", "of shape ["] if left < 0 else ["ends within its header"]
    assert all(words in str(error.value) for words in said) and str(file) in str(error.value)
    assert left >= 0 or any(repr(name) in str(error.value) for name in header)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("architectures", ["MambaForCausalLM"], ["'MambaForCausalLM'", "LlamaForCausalLM", "Gemma2ForCausalLM"]),
        ("hidden_act", "relu", ["hidden_act 'relu'", "'silu'"]),
        ("attention_bias", True, ["attention_bias True"]),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}, ["rope_type 'yarn'", "'llama3'"]),
        ("hidden_size", None, ["lacks the field 'hidden_size'"]),
    ],
)
def test_a_configuration_that_is_not_supported_is_refused(folder, field, value, said):
    values = json.loads((folder / "config.json").read_text())
    values.pop(field) if value is None else values.update({field: value})
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError) as error:
        huggingface.load_config(folder)
    assert all(words in str(error.value) for words in said), error.value


def test_an_index_that_names_what_is_not_there_is_refused(tmp_path):
    huggingface.save(tmp_path / "m", CONFIGS["llama"], weights(CONFIGS["llama"]), shard_bytes=4000)
    index = tmp_path / "m" / "model.safetensors.index.json"
    where = json.loads(index.read_text())
    file = where["weight_map"][Q]
    assert Q in safe_open(tmp_path / "m" / file, "numpy").keys()
    where["weight_map"][Q] = "model-00001-of-" + file[-17:]
    index.write_text(json.dumps(where))
    with pytest.raises(ValueError, match=f"says that tensor '{Q}' is in"):
        huggingface.load_canonical(tmp_path / "m")
    (tmp_path / "m" / file).unlink()
    with pytest.raises(ValueError, match=f"names the file {file}"):
        huggingface.load_canonical(tmp_path / "m")


def test_nothing_is_overwritten_and_nothing_half_written_is_left_under_the_name(folder, monkeypatch):
    with pytest.raises(ValueError, match="exists; give a new folder"):
        huggingface.save(folder, CONFIGS["llama"], weights(CONFIGS["llama"]))
    other = folder.with_name("other")
    broken = weights(CONFIGS["llama"])
    broken["head"] = object()
    with pytest.raises(TypeError):
        huggingface.save(other, CONFIGS["llama"], broken)
    assert not other.exists()


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no config.json"):
        huggingface.load_config(tmp_path)
