"""Properties of the GPT blocks: what they compute."""

import dataclasses
import functools
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from vocabpp_jax.models import Decoder, GPTConfig, build, named, reference_logits
from vocabpp_jax.models.config import attention_implementation

CONFIG = GPTConfig(layers=2, hidden=32, heads=4, seq=12, vocab_size=50)
B, L, D = 2, CONFIG.seq, CONFIG.hidden
BLOCK = jax.jit(build(CONFIG).block)


def random_params(config):
    """Canonical parameters with nothing at its special initial value: no zero bias, no unit scale."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: jnp.asarray(0.2 * rng.normal(size=a.shape), a.dtype), build(config).param_shapes())


def block_inputs(config=CONFIG):
    x = np.random.default_rng(1).normal(size=(B, config.seq, config.hidden))
    return random_params(config)["blocks"][0], x.astype(np.float32)


def assert_close(actual, expected, tolerance=1e-5):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        scale = max(1.0, float(np.max(np.abs(e))))
        np.testing.assert_allclose(np.asarray(a), np.asarray(e), rtol=0, atol=tolerance * scale)


# --- configuration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(heads=5), ["heads is 5", "divide hidden", "32"]),
        (dict(layers=0), ["layers is 0", "positive integer"]),
        (dict(hidden=-4), ["hidden is -4", "positive integer"]),
        (dict(seq=2.0), ["seq is 2.0", "positive integer"]),
        (dict(mlp_ratio=0), ["mlp_ratio is 0", "positive integer"]),
        (dict(vocab_size=True), ["vocab_size is True", "positive integer"]),
        (dict(dtype="float64"), ["dtype is 'float64'", "float32, bfloat16"]),
        (dict(attention="flash"), ["attention is 'flash'", "auto, xla, cudnn"]),
        (dict(residuals="none"), ["residuals is 'none'", "selective, everything, full"]),
        (dict(attention="cudnn"), ["attention is 'cudnn'", "'float32'", "bfloat16"]),
        (dict(attention="cudnn", dtype="bfloat16", hidden=48), ["12 wide", "multiple of 8"]),
    ],
)
def test_a_wrong_field_is_refused_by_name_value_and_what_would_do(wrong, said):
    with pytest.raises(ValueError) as error:
        dataclasses.replace(CONFIG, **wrong)
    assert all(words in str(error.value) for words in said)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("backend", "dtype", "hidden", "expected"),
    [
        ("cpu", "bfloat16", 64, "xla"),
        ("gpu", "bfloat16", 64, "cudnn"),
        ("gpu", "float32", 64, "xla"),
        ("gpu", "bfloat16", 48, "xla"),  # heads 12 wide
        ("gpu", "bfloat16", 1024, "xla"),  # heads 256 wide
    ],
)
def test_auto_attention_is_cudnn_only_where_cudnn_takes_it(monkeypatch, backend, dtype, hidden, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    config = dataclasses.replace(CONFIG, dtype=dtype, hidden=hidden)
    assert attention_implementation(config) == attention_implementation(config, backend) == expected
    assert attention_implementation(named("gemma-tiny", dtype="bfloat16"), "gpu") == "xla"  # capped scores


def test_chosen_attention_does_not_depend_on_the_backend(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    config = dataclasses.replace(CONFIG, dtype="bfloat16", hidden=64)
    assert attention_implementation(dataclasses.replace(config, attention="xla")) == "xla"
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert attention_implementation(dataclasses.replace(config, attention="cudnn")) == "cudnn"


# --- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_canonical_tree_has_the_shapes_of_the_contract(tied):
    model = build(dataclasses.replace(CONFIG, tie_embeddings=tied))
    shapes = model.param_shapes()
    assert set(shapes) == {"embed", "blocks", "final"} | (set() if tied else {"head"})
    assert {k: a.shape for k, a in shapes["embed"].items()} == {"tokens": (50, 32), "positions": (12, 32)}
    assert isinstance(shapes["blocks"], tuple) and len(shapes["blocks"]) == model.layers
    assert len({str(block) for block in shapes["blocks"]}) == 1
    assert shapes["blocks"][0]["attention"]["qkv"]["kernel"].shape == (32, 96)
    assert shapes["blocks"][0]["mlp"]["up"]["bias"].shape == (128,)
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(shapes))
    assert (model.positions, model.tied, model.width, model.vocab_size) == (12, tied, 32, 50)


def test_biases_and_norms_are_the_parameters_with_one_dimension():
    for path, leaf in jax.tree_util.tree_leaves_with_path(build(CONFIG).param_shapes()["blocks"][0]):
        assert leaf.ndim == (2 if path[-1].key == "kernel" else 1)
        assert path[-1].key in ("kernel", "bias", "scale")


def test_init_is_gpt2s():
    config = GPTConfig(layers=2, hidden=128, heads=4, seq=64, vocab_size=300)
    params = jax.jit(build(config).init)(jax.random.key(0))
    for block in params["blocks"]:
        for branch, name, std in [
            ("attention", "qkv", 0.02),
            ("mlp", "up", 0.02),
            ("attention", "out", 0.01),  # 0.02 / sqrt(2 * 2 layers)
            ("mlp", "down", 0.01),
        ]:
            assert np.std(block[branch][name]["kernel"]) == pytest.approx(std, rel=0.03)
            assert not np.any(block[branch][name]["bias"])
        assert np.all(block["mlp"]["norm"]["scale"] == 1) and not np.any(block["mlp"]["norm"]["bias"])
    for table in (params["embed"]["tokens"], params["embed"]["positions"], params["head"]):
        assert np.std(table) == pytest.approx(0.02, rel=0.03)
    first, second = (block["mlp"]["up"]["kernel"] for block in params["blocks"])
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.02


# --- the block ------------------------------------------------------------------------------------------------------


def test_attention_is_causal():
    params, x = block_inputs()
    later = np.concatenate([x[:, :7], -x[:, 7:]], axis=1)
    before, after = (np.asarray(BLOCK(params, array, {})) for array in (x, later))
    np.testing.assert_allclose(before[:, :7], after[:, :7], atol=1e-6)
    assert np.all(np.max(np.abs(before - after)[:, 7:], axis=-1) > 1e-3)


@settings(deadline=None, max_examples=20)
@given(cuts=st.lists(st.sets(st.integers(1, L - 1), max_size=4), min_size=B, max_size=B))
def test_packed_documents_equal_documents_alone(cuts):
    params, x = block_inputs()
    edges = [[0, *sorted(row), L] for row in cuts]
    segment_ids = np.stack([np.repeat(np.arange(len(row) - 1), np.diff(row)) for row in edges])
    packed = np.asarray(BLOCK(params, x, {"segment_ids": segment_ids}))
    for row in range(B):
        for start, end in pairwise(edges[row]):
            # A document alone, whatever follows it in its row: causal attention does not see that.
            alone = np.asarray(BLOCK(params, np.roll(x, -start, axis=1), {}))
            assert_close(packed[row, start:end], alone[row, : end - start])


@functools.cache
def value_and_gradients(config, dtype):
    @jax.jit
    def run(params, x):
        out, vjp = jax.vjp(lambda p, x: build(config).block(p, x, {}), params, x)
        return out, *vjp(jnp.cos(out))

    return run(*jax.tree.map(lambda a: a.astype(dtype), block_inputs(config)))


@pytest.mark.parametrize("residuals", ["selective", "full"])
def test_recomputing_changes_no_value_and_no_gradient(residuals):
    expected = value_and_gradients(dataclasses.replace(CONFIG, residuals="everything"), "float32")
    assert_close(value_and_gradients(dataclasses.replace(CONFIG, residuals=residuals), "float32"), expected)


def test_bfloat16_stays_bfloat16_and_near_float32():
    low = value_and_gradients(CONFIG, "bfloat16")
    assert all(a.dtype == jnp.bfloat16 for a in jax.tree.leaves(low))
    high = value_and_gradients(CONFIG, "float32")
    for a, e in zip(jax.tree.leaves(low), jax.tree.leaves(high), strict=True):
        assert np.linalg.norm(a.astype(jnp.float32) - e) < 0.03 * np.linalg.norm(e)


def test_norm_statistics_are_float32_in_bfloat16():
    model = build(CONFIG)
    norm = {"scale": jnp.ones(D, jnp.bfloat16), "bias": jnp.zeros(D, jnp.bfloat16)}
    x = (256.0 + jnp.arange(D)).astype(jnp.bfloat16)[None, None]  # a bfloat16 mean would be off by whole units
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean()) / np.sqrt(exact.var() + 1e-5)
    np.testing.assert_allclose(np.asarray(model.final(norm, x), np.float64), exact, rtol=2**-8, atol=1e-6)


def test_norm_statistics_do_not_cancel_far_from_zero():
    norm = {"scale": jnp.ones(D), "bias": jnp.zeros(D)}
    x = (1000 + 0.1 * np.random.default_rng(0).normal(size=(1, 1, D))).astype(np.float32)
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean()) / np.sqrt(exact.var() + 1e-5)
    np.testing.assert_allclose(build(CONFIG).final(norm, jnp.asarray(x)), exact, atol=2e-3)


# --- the whole model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tied", "packed"), [(False, False), (True, True)])
def test_gpt_module_equals_its_blocks_composed(tied, packed):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    params = random_params(config)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (B, 9))  # shorter than seq
    segment_ids = np.tile(np.arange(9) // 4, (B, 1)) if packed else None
    module = Decoder.from_canonical(config, params)
    aux_inputs = {"segment_ids": segment_ids} if packed else {}
    composed = jax.jit(reference_logits, static_argnums=0)(build(config), params, tokens, aux_inputs)
    assert_close(nnx.jit(module)(tokens, segment_ids), composed)


@pytest.mark.parametrize("tied", [False, True])
def test_canonical_parameters_round_trip(tied):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    params = random_params(config)
    again = Decoder.from_canonical(config, params).canonical()
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True))


def test_gpt_module_trains_in_bfloat16_with_float32_gradients():
    module = Decoder.from_canonical(dataclasses.replace(CONFIG, dtype="bfloat16"), random_params(CONFIG))
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (B, L))

    @nnx.jit
    def loss_and_gradients(module):
        return nnx.value_and_grad(lambda m: -jax.nn.log_softmax(m(tokens))[..., 0].mean())(module)

    loss, gradients = loss_and_gradients(module)
    assert loss.dtype == jnp.float32
    assert all(g.dtype == jnp.float32 and np.any(g) for g in jax.tree.leaves(gradients))


def test_a_sequence_longer_than_the_position_table_is_refused():
    with pytest.raises(ValueError, match="tokens are 13 long; seq, .* is 12"):
        Decoder.from_canonical(CONFIG, random_params(CONFIG))(jnp.zeros((1, 13), jnp.int32))
