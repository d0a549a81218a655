"""Properties of the GPT blocks: what they compute, what their backward keeps, and what their sizes count."""

import dataclasses
import functools
import math
from collections import Counter
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from vocabpp_jax.models import (
    SIZES,
    Decoder,
    GPTConfig,
    build,
    embedding_flops,
    head_flops,
    layer_flops,
    layer_parameters,
    model_flops,
    named,
    parameters,
    reference_logits,
    vocabulary_parameters,
)
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


# --- what the backward keeps ----------------------------------------------------------------------------------------


@jax.custom_vjp
def flash_stand_in(q, k, v):
    return _flash_forward(q, k, v)[0]


def _flash_forward(q, k, v):
    probabilities = jax.nn.softmax(jnp.einsum("blhk,bmhk->bhlm", q, k).astype(jnp.float32))
    out = jnp.einsum("bhlm,bmhk->blhk", probabilities.astype(q.dtype), v)
    return out, (q, k, v, out, probabilities.sum(-1))


def _flash_backward(kept, g):
    q, k, v, out, statistics = kept
    return g * q, out * k, v * statistics[0, 0, 0].astype(v.dtype)


flash_stand_in.defvjp(_flash_forward, _flash_backward)


def trace_backward(config, b=1, aux_inputs=None):
    """The jaxpr ``(parameters, x, aux_inputs) -> (block output, residuals)``, its residuals, how many parameters."""
    model = build(config)
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, config.dtype), model.param_shapes()["blocks"][0])
    x = jax.ShapeDtypeStruct((b, config.seq, config.hidden), config.dtype)
    forward = jax.make_jaxpr(lambda p, x, aux_inputs: jax.vjp(lambda p, x: model.block(p, x, aux_inputs), p, x))
    jaxpr = forward(params, x, aux_inputs or {}).jaxpr
    residuals = [v for v in jaxpr.outvars[1:] if not is_literal(v)]
    return jaxpr, list(dict.fromkeys(residuals)), len(jax.tree.leaves(params))


def is_literal(v):
    return hasattr(v, "val")


def kept_activations(config, **kwargs):
    """Distinct residuals that are not parameters, as abstract values."""
    jaxpr, residuals, n = trace_backward(config, **kwargs)
    return [v.aval for v in residuals if v not in jaxpr.invars[:n]]


def test_selective_keeps_ten_bsh_of_a_layer_beside_flash_statistics(monkeypatch):
    """Design target: input, q, k, v, attention output, post-attention stream and the 4h wide pre-activation."""
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, **_: flash_stand_in(q, k, v))
    b, s, h = 1, 2048, 3072
    config = named("4B", seq=s, attention="cudnn")
    kept = kept_activations(config, b=b)
    statistics = [a for a in kept if a.shape == (b, config.heads, s)]
    assert len(statistics) == 1
    assert sum(a.size for a in kept if a.dtype == jnp.bfloat16) == 10 * b * s * h
    assert sum(a.size * a.dtype.itemsize for a in kept) == 20 * b * s * h + 4 * b * s * config.heads


@pytest.mark.parametrize("aux_inputs", [{}, {"segment_ids": jax.ShapeDtypeStruct((1, 48), jnp.int32)}])
def test_selective_keeps_ten_bsh_beside_the_weights_of_attention_that_is_written_out(aux_inputs):
    config = GPTConfig(layers=2, hidden=32, heads=4, seq=48, vocab_size=50)
    kept = kept_activations(config, aux_inputs=aux_inputs)
    assert [a.shape for a in kept if a.shape[-2:] == (48, 48)] == [(1, 4, 1, 48, 48)]
    assert sum(a.size for a in kept) == 10 * 48 * 32 + 4 * 48 * 48


def test_full_keeps_the_block_input_only():
    kept = kept_activations(dataclasses.replace(CONFIG, residuals="full"))
    assert [a.shape for a in kept] == [(1, L, D)]


def test_keeping_everything_keeps_more():
    sizes = [
        sum(a.size for a in kept_activations(dataclasses.replace(CONFIG, residuals=residuals)))
        for residuals in ("full", "selective", "everything")
    ]
    assert sizes[0] < sizes[1] < sizes[2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("residuals", ["selective", "full"])
def test_no_residual_is_computed_from_weights_alone(residuals, dtype):
    jaxpr, kept, n = trace_backward(dataclasses.replace(CONFIG, residuals=residuals, dtype=dtype))
    from_x = set(jaxpr.invars[n:])
    for equation in jaxpr.eqns:
        if any(v in from_x for v in equation.invars if not is_literal(v)):
            from_x.update(equation.outvars)
    assert all(v in jaxpr.invars[:n] or v in from_x for v in kept)


def inner_jaxprs(equation):
    for value in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
        if hasattr(value, "jaxpr"):
            yield value.jaxpr
        elif hasattr(value, "eqns"):
            yield value


def matrix_products(jaxpr):
    """Multiply-adds of every dot_general in a jaxpr, by count of equal ones."""
    found = Counter()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contract, _), _ = equation.params["dimension_numbers"]
            width = math.prod(equation.invars[0].aval.shape[i] for i in contract)
            found[width * equation.outvars[0].aval.size] += 1
        for inner in inner_jaxprs(equation):
            found += matrix_products(inner)
    return found


def forward_and_backward(config):
    model = build(config)
    params = model.param_shapes()["blocks"][0]
    x = jax.ShapeDtypeStruct((B, config.seq, config.hidden), jnp.float32)
    block = lambda p, x: model.block(p, x, {})  # noqa: E731
    return (
        jax.make_jaxpr(block)(params, x).jaxpr,
        jax.make_jaxpr(lambda p, x, g: jax.vjp(block, p, x)[1](g))(params, x, x).jaxpr,
    )


@pytest.mark.parametrize(("residuals", "repeats"), [("selective", 0), ("everything", 0), ("full", 1)])
def test_only_full_recomputes_matrix_products(residuals, repeats):
    forward, both = map(matrix_products, forward_and_backward(dataclasses.replace(CONFIG, residuals=residuals)))
    assert forward.total() == 6
    if repeats:
        assert both.total() > 3 * forward.total()
    else:  # two products of the same size for each in the forward
        assert both == Counter({size: 3 * count for size, count in forward.items()})


def test_each_recomputed_region_holds_one_matrix_product():
    forward, _ = forward_and_backward(CONFIG)
    regions = [e for e in forward.eqns if e.primitive.name in ("remat", "remat2", "checkpoint")]
    assert len(regions) == 4
    for region in regions:
        assert sum(matrix_products(inner).total() for inner in inner_jaxprs(region)) == 1


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


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layers", "heads", "hidden"),
    [
        ("4B", 32, 24, 3072),
        ("10B", 48, 32, 4096),
        ("21B", 64, 40, 5120),
        ("7B", 32, 32, 4096),
        ("16B", 48, 40, 5120),
        ("30B", 64, 48, 6144),
    ],
)
def test_published_sizes_are_the_published_ones(name, layers, heads, hidden):
    config = named(name, vocab_size=256_000, seq=4096)
    assert (config.layers, config.heads, config.hidden) == (layers, heads, hidden)
    assert (config.seq, config.vocab_size, config.tie_embeddings) == (4096, 256_000, False)
    b, s, h, V = 1, config.seq, config.hidden, config.vocab_size
    assert layer_flops(config) == b * s * h * (72 * h + 12 * s)
    assert head_flops(config) == 6 * b * s * h * V
    assert model_flops(config) == layers * layer_flops(config) + head_flops(config)
    assert layer_parameters(config) == pytest.approx(12 * h * h, rel=2e-3)
    assert vocabulary_parameters(config) == h * V


def test_an_unknown_size_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'5B'.*gpt-tiny, .*30B"):
        named("5B")


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted_exactly(name, tied):
    config = named(name, tie_embeddings=tied, layers=2)
    shapes = build(config).param_shapes()
    count = lambda tree: sum(a.size for a in jax.tree.leaves(tree))  # noqa: E731
    assert parameters(config) == count(shapes)
    assert layer_parameters(config) == count(shapes["blocks"][0])
    assert vocabulary_parameters(config) == shapes["embed"]["tokens"].size


@pytest.mark.parametrize("mlp_ratio", [1, 4])
def test_layer_flops_are_those_of_its_matrix_products(mlp_ratio):
    config = dataclasses.replace(CONFIG, mlp_ratio=mlp_ratio)
    _, both = forward_and_backward(config)
    assert sum(2 * size * count for size, count in matrix_products(both).items()) == layer_flops(config, batch=B)


def test_flops_grow_with_the_batch():
    for flops in (layer_flops, head_flops, embedding_flops, model_flops):
        assert flops(CONFIG, batch=3) == 3 * flops(CONFIG)
