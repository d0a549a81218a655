"""Every architecture computes what `transformers` computes, and its files are theirs. Needs transformers and torch."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vocabpp_jax import models
from vocabpp_jax.models import huggingface
from vocabpp_jax.pipeline.weight_streaming import leaves

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.torch]
torch = pytest.importorskip("torch", reason="a test extra: pip install vocabpp-jax[transformers]")
transformers = pytest.importorskip("transformers", reason="a test extra: pip install vocabpp-jax[transformers]")

SHAPE = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, vocab_size=37)
SHAPE |= dict(num_key_value_heads=2, head_dim=8, max_position_embeddings=32, initializer_range=0.3)
SHAPE |= dict(pad_token_id=None)  # torch gives that token's embedding no gradient
LONGER = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES = {
    "llama": ("LlamaConfig", SHAPE),
    "llama-3.1": (
        "LlamaConfig",
        SHAPE | dict(rope_parameters=LONGER | {"original_max_position_embeddings": 16}, tie_word_embeddings=True),
    ),
    # Qwen 2 has no width of a head of its own.
    "qwen2": ("Qwen2Config", {k: v for k, v in SHAPE.items() if k != "head_dim"}),
    "qwen3": ("Qwen3Config", SHAPE | dict(tie_word_embeddings=True)),
    "gemma2": ("Gemma2Config", SHAPE | dict(sliding_window=5, query_pre_attn_scalar=11, attn_logit_softcapping=2.0)),
    "gemma2-untied": (
        "Gemma2Config",
        SHAPE | dict(sliding_window=5, final_logit_softcapping=3.0, tie_word_embeddings=False),
    ),
    "gpt2": (
        "GPT2Config",
        dict(n_embd=24, n_layer=3, n_head=4, n_positions=32, vocab_size=37, initializer_range=0.3),
    ),
}
B, L = 2, 12


def theirs(name):
    """Their model with random weights, none of them special."""
    kind, fields = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**fields, attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("name", CASES)
def test_logits_loss_and_gradients_are_those_of_transformers(name, tmp_path):
    model = theirs(name)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="4KB" if name == "llama" else "5GB")
    config, params = huggingface.load_canonical(tmp_path / "theirs")
    tokens, labels = np.random.default_rng(0).integers(0, 37, (2, B, L))

    logits = model(torch.tensor(tokens)).logits
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 37), torch.tensor(labels).reshape(-1))
    loss.backward()
    ours = models.build(config)
    got = jax.jit(lambda p: models.reference_logits(ours, p, jnp.asarray(tokens), {}))(params)
    np.testing.assert_allclose(got, logits.detach().numpy(), atol=1e-4, rtol=1e-4)
    value, gradients = jax.jit(
        jax.value_and_grad(lambda p: models.reference_loss(ours, p, tokens[None], labels[None]))
    )(params)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    huggingface.save(tmp_path / "gradients", config, gradients)
    grads = _tensors(tmp_path / "gradients")
    want = {n: p.grad.numpy() for n, p in model.named_parameters()}
    assert set(grads) == set(want)
    for n in want:
        scale = np.abs(want[n]).max()
        np.testing.assert_allclose(grads[n], want[n], atol=1e-4 * scale, err_msg=n)


@pytest.mark.parametrize("name", CASES)
def test_an_exported_folder_is_read_by_transformers_names_and_bits_the_same(name, tmp_path):
    model = theirs(name)
    model.save_pretrained(tmp_path / "theirs")
    config, params = huggingface.load_canonical(tmp_path / "theirs")
    huggingface.save(tmp_path / "ours", config, params, shard_bytes=4000)
    want, got = _tensors(tmp_path / "theirs"), _tensors(tmp_path / "ours")
    assert set(got) == set(want)
    for n in want:
        np.testing.assert_array_equal(got[n], want[n], err_msg=n)
    again, said = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(said.values()), said
    assert type(again) is type(model)
    tokens = torch.tensor(np.random.default_rng(0).integers(0, 37, (B, L)))
    again.set_attn_implementation("eager")
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits)


def test_every_leaf_and_every_field_of_a_configuration_comes_back(tmp_path):
    for name in CASES:
        theirs(name).save_pretrained(tmp_path / name)
        config, params = huggingface.load_canonical(tmp_path / name)
        huggingface.save(tmp_path / f"{name}-again", config, params)
        assert huggingface.load_config(tmp_path / f"{name}-again") == config
        assert [p for p, _ in leaves(params)] == [p for p, _ in leaves(models.build(config).param_shapes())]
        assert dataclasses.replace(config, dtype="float32") == config


def _tensors(folder):
    from safetensors.numpy import load_file

    files = sorted(folder.glob("*.safetensors"))
    if (folder / "model.safetensors.index.json").exists():
        where = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        assert {f.name for f in files} == set(where.values())
    return {name: tensor for file in files for name, tensor in load_file(file).items()}
