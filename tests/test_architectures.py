"""What holds for every architecture, and what each has of its own. What they compute is tests/test_transformers.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_models import assert_close, random_params
from test_residuals import inner_jaxprs, kept_activations, matrix_products

from vocabpp_jax import models
from vocabpp_jax.models import attention
from vocabpp_jax.models.norms import LayerNorm, RMSNorm
from vocabpp_jax.pipeline.linearize import linearize

B, L = 2, 12
SHAPE = dict(layers=2, hidden=32, heads=4, kv_heads=2, head_size=6, inner=40, seq=L, vocab_size=50)
CONFIGS = {
    "llama": models.LlamaConfig(**SHAPE),
    "qwen2": models.QwenConfig(**SHAPE, generation=2),
    "qwen3": models.QwenConfig(**SHAPE, generation=3),
    "gemma2": models.GemmaConfig(**SHAPE, window=4, query_scalar=6),
}
EACH = pytest.mark.parametrize("name", CONFIGS)


def inputs(config, layer=0):
    """Parameters of one layer, none of them special, its input, and what it alone has of side inputs."""
    x = np.random.default_rng(1).normal(size=(B, config.seq, config.hidden)).astype(np.float32)
    aux_inputs = config.layer_aux_inputs[layer] if config.layer_aux_inputs else {}
    return random_params(config)["blocks"][layer], x, aux_inputs


def shapes(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def flops(closed):
    return sum(2 * size * count for size, count in matrix_products(closed.jaxpr).items())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(kv_heads=3), "kv_heads is 3; it must divide heads, which is 4"),
        (dict(head_size=7), "head_size is 7; rotary positions need an even one"),
        (dict(inner=0), "inner is 0; it must be a positive integer"),
        (dict(norm_epsilon=0.0), "norm_epsilon is 0.0; it must be above 0"),
    ],
)
def test_a_wrong_field_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(CONFIGS["llama"], **wrong)


def test_what_an_architecture_does_not_have_is_refused():
    with pytest.raises(ValueError, match="generation is 4; it must be one of 2, 3"):
        dataclasses.replace(CONFIGS["qwen3"], generation=4)
    with pytest.raises(ValueError, match="attention is 'cudnn'; its kernels have no soft cap"):
        dataclasses.replace(CONFIGS["gemma2"], attention="cudnn", dtype="bfloat16", head_size=64)
    with pytest.raises(ValueError, match="mlp_ratio is given, which llama-tiny does not have"):
        models.named("llama-tiny", mlp_ratio=3)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gpt-small", 124_439_808),
        ("gpt2-xl", 1_557_611_200),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3.2-1b", 1_235_814_400),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-8b", 8_190_735_360),
        ("gemma2-9b", 9_241_705_984),
    ],
)
def test_named_sizes_have_as_many_parameters_as_the_published_weights(name, count):
    assert models.parameters(models.SIZES[name]) == count


@EACH
def test_flops_are_those_of_the_matrix_products_and_the_cost_model_counts_the_same(name):
    config = dataclasses.replace(CONFIGS[name], window=L) if name == "gemma2" else CONFIGS[name]
    params, x, aux_inputs = inputs(config)
    model = models.build(config)
    both = jax.make_jaxpr(lambda p, x, g: jax.vjp(lambda p, x: model.block(p, x, aux_inputs), p, x)[1](g))(params, x, x)
    assert flops(both) == models.layer_flops(config, batch=B)
    sizes = models.cost_sizes(config, B)
    assert sizes.iteration_flops(3) == 3 * models.model_flops(config, B)


def test_a_local_layer_counts_the_keys_that_it_can_reach():
    config = CONFIGS["gemma2"]
    assert [config.span(layer) for layer in range(2)] == [4, 12]
    assert models.attended(config) == 4 * 6 * (4 + 12) / 2
    assert models.layer_flops(config) < models.layer_flops(dataclasses.replace(config, window=L))


@EACH
def test_selective_keeps_what_the_cost_model_is_told(name, monkeypatch):
    where = "gemma" if name == "gemma2" else "attention"
    monkeypatch.setattr(f"vocabpp_jax.models.{where}.blocked_attention", lambda q, k, v, *_, **__: flash(q, k, v))
    config = dataclasses.replace(CONFIGS[name], seq=64)
    kept = kept_activations(config, aux_inputs=shapes(inputs(config)[2]))
    # Beside it: flash attention's sums, and the rotary frequencies, which a pipeline takes anew (see linearize).
    others = [a for a in kept if a.shape in ((1, config.heads, 64), (config.head_size // 2,))]
    assert sum(a.size for a in kept) - sum(a.size for a in others) == 64 * config.kept_width


@EACH
def test_attention_that_is_written_out_keeps_one_matrix_a_head(name):
    config = dataclasses.replace(CONFIGS[name], seq=64)
    kept = [a.shape for a in kept_activations(config, aux_inputs=shapes(inputs(config)[2]))]
    assert [shape for shape in kept if shape[-2:] == (64, 64)] == [(1, 2, 2, 64, 64)]


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("blocks", [2, 3, 4])
def test_attention_in_blocks_of_queries_is_attention_and_keeps_less(blocks, cap, monkeypatch):
    length = 18  # that four do not divide
    q, k, v, g = (jax.random.normal(jax.random.key(n), (2, length, heads, 8)) for n, heads in enumerate((4, 2, 2, 4)))
    aux_inputs = {"segment_ids": np.repeat([[0, 1]], [5, length - 5], axis=1).repeat(2, axis=0)}
    attended = functools.partial(
        attention.blocked_attention, seen=attention.attention_mask(length, aux_inputs, window=9), scale=8**-0.5, cap=cap
    )
    want, whole = jax.vjp(attended, q, k, v)
    wanted = whole(g)
    monkeypatch.setattr(attention, "_QUERIES", length // blocks)
    got, parts = jax.vjp(attended, q, k, v)
    assert_close(got, want)
    jax.tree.map(assert_close, parts(g), wanted)
    scores = [sum(a.size for a in jax.tree.leaves(of) if a.ndim == 5 and a.shape[-1] > 8) for of in (parts, whole)]
    assert scores[0] < scores[1]


def test_a_layer_norm_is_flax_layer_norm_and_keeps_its_input_alone():
    x = 3 + np.random.default_rng(0).normal(size=(B, L, 32)).astype(np.float32)
    mine, flax = LayerNorm(32, 1e-5), nnx.LayerNorm(32, epsilon=1e-5, use_fast_variance=False, rngs=nnx.Rngs(0))
    _holds_as(mine, flax, x)


def test_an_rms_norm_is_flax_rms_norm_and_keeps_its_input_alone():
    x = np.random.default_rng(0).normal(size=(B, L, 32)).astype(np.float32)
    mine, flax = RMSNorm(32, 1e-5, offset=1.0), nnx.RMSNorm(32, epsilon=1e-5, rngs=nnx.Rngs(0))
    _holds_as(mine, flax, x, offset=1.0)


def _holds_as(mine, flax, x, offset=0.0):
    rng = np.random.default_rng(1)
    for name, param in nnx.to_pure_dict(nnx.state(flax)).items():
        drawn = rng.normal(size=param.shape).astype(np.float32)
        getattr(flax, name)[...] = drawn
        getattr(mine, name)[...] = drawn - (offset if name == "scale" else 0)
    (graph, params), (flax_graph, flax_params) = nnx.split(mine), nnx.split(flax)
    got, backward = jax.vjp(lambda params, x: nnx.merge(graph, params)(x), params, x)
    want, flax_backward = jax.vjp(lambda params, x: nnx.merge(flax_graph, params)(x), flax_params, x)
    assert_close(got, want)
    (dparams, dx), (flax_dparams, flax_dx) = backward(np.cos(x)), flax_backward(np.cos(x))
    jax.tree.map(assert_close, nnx.to_pure_dict(dparams), nnx.to_pure_dict(flax_dparams))
    assert_close(dx, flax_dx)
    assert sum(a.size for a in jax.tree.leaves(backward) if a.size > 2 * 32) == x.size


def test_attention_by_cudnn_is_the_one_that_is_written_out(monkeypatch):
    real = jax.nn.dot_product_attention
    in_its_place = lambda *a, implementation, **k: real(*a, **k, implementation="xla")  # noqa: E731
    monkeypatch.setattr(jax.nn, "dot_product_attention", in_its_place)
    config = dataclasses.replace(CONFIGS["llama"], attention="cudnn", dtype="bfloat16", head_size=8)
    q, k, v = (jax.random.normal(jax.random.key(n), (B, L, heads, 8)) for n, heads in enumerate((4, 2, 2)))
    aux_inputs = {"segment_ids": np.repeat([[0, 1]], [5, L - 5], axis=1).repeat(B, axis=0)}
    want = attention.blocked_attention(q, k, v, attention.attention_mask(L, aux_inputs), scale=8**-0.5)
    assert_close(attention.attend(config, q, k, v, aux_inputs), want)


@jax.custom_vjp
def flash(q, k, v):
    """Grouped queries in a kernel that keeps its inputs, its output and the sums, as cuDNN's does."""
    return _flash_forward(q, k, v)[0]


def _flash_forward(q, k, v):
    wide = [jnp.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v)]
    scores = jax.nn.softmax(jnp.einsum("blhk,bmhk->bhlm", q, wide[0]))
    out = jnp.einsum("bhlm,bmhk->blhk", scores, wide[1])
    return out, (q, k, v, out, scores.sum(-1))


flash.defvjp(_flash_forward, lambda kept, g: (g * kept[0], kept[1] * g.sum(), kept[2] * kept[4][0, 0, 0]))


@pytest.mark.sampled(2)
@EACH
def test_passes_are_the_vjp_and_a_split_backward_repeats_no_matrix_product(name):
    config = CONFIGS[name]
    params, x, aux_inputs = inputs(config)
    block = models.build(config).block
    whole, cut = (linearize(block, shapes(params), shapes(x), shapes(aux_inputs), split=s) for s in (False, True))
    y, residual, kept = cut.forward(params, aux_inputs, x)
    early, dx, carried = cut.backward(params, aux_inputs, residual, kept, x)
    late = cut.weights(params, aux_inputs, kept, carried)
    got = jax.tree.map(lambda a, b: b if a is None else a, early, late, is_leaf=lambda a: a is None)
    want_y, vjp = jax.vjp(lambda p, x: block(p, x, aux_inputs), params, x)
    assert_close((y, got, dx), (want_y, *vjp(x)))
    unsplit = flops(jax.make_jaxpr(whole.backward)(params, aux_inputs, whole.residual, whole.kept, x))
    split = flops(jax.make_jaxpr(cut.backward)(params, aux_inputs, residual, kept, x))
    split += flops(jax.make_jaxpr(cut.weights)(params, aux_inputs, kept, carried))
    assert split == unsplit
    weights = {w.shape for w in jax.tree.leaves(params) if w.ndim == 2}
    assert all(s.shape not in weights for s in (*cut.residual, *cut.kept, *cut.carried))


@EACH
@pytest.mark.parametrize("residuals", ["everything", "full"])
def test_recomputing_changes_no_value_and_no_gradient(name, residuals):
    params, x, aux_inputs = inputs(CONFIGS[name])

    def run(config):
        block = models.build(config).block
        out, vjp = jax.vjp(lambda p, x: block(p, x, aux_inputs), params, x)
        return out, *vjp(jnp.cos(out))

    assert_close(run(dataclasses.replace(CONFIGS[name], residuals=residuals)), run(CONFIGS[name]))


@EACH
def test_attention_is_causal_and_packed_documents_equal_documents_alone(name):
    config = CONFIGS[name]
    params, x, aux_inputs = inputs(config, layer=1)
    block = jax.jit(models.build(config).block)
    later = np.concatenate([x[:, :7], -x[:, 7:]], axis=1)
    before, after = (np.asarray(block(params, array, aux_inputs)) for array in (x, later))
    np.testing.assert_allclose(before[:, :7], after[:, :7], atol=1e-5)
    ids = np.repeat([[0, 1]], [5, L - 5], axis=1).repeat(B, axis=0)
    packed = block(params, x, aux_inputs | {"segment_ids": ids})
    # Rotary positions are relative: a document alone starts at 0, packed at 5.
    alone = block(params, np.roll(x, -5, axis=1), aux_inputs)
    assert_close(packed[:, 5:], alone[:, : L - 5], 1e-4)


def test_gemmas_even_layers_see_no_further_than_their_window_and_odd_ones_everything():
    config = CONFIGS["gemma2"]
    block = jax.jit(models.build(config).block)
    for layer, reach in ((0, 4), (1, L)):
        params, x, aux_inputs = inputs(config, layer)
        first = x.copy()
        first[:, 0] += 1
        moved = np.abs(np.asarray(block(params, first, aux_inputs)) - np.asarray(block(params, x, aux_inputs))).max(
            (0, 2)
        )
        assert np.all(moved[:reach] > 1e-4) and np.all(moved[reach:] < 1e-6)


@EACH
def test_the_module_equals_its_blocks_composed_and_holds_canonical_parameters(name):
    config = CONFIGS[name]
    params = random_params(config)
    module = models.Decoder.from_canonical(config, params)
    again = module.canonical()
    assert jax.tree.structure(again) == jax.tree.structure(params)
    tokens = np.random.default_rng(0).integers(0, 50, (B, 9))
    composed = jax.jit(lambda p, t: models.reference_logits(models.build(config), p, t, {}))(params, tokens)
    assert_close(nnx.jit(module)(tokens), composed)


@EACH
def test_blocks_stay_in_bfloat16_and_norms_and_softmaxes_are_computed_in_float32(name):
    params, x, aux_inputs = inputs(CONFIGS[name])
    low = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), (params, x))
    jaxpr = jax.make_jaxpr(lambda p, x: models.build(CONFIGS[name]).block(p, x, aux_inputs))(*low)
    assert jaxpr.out_avals[0].dtype == jnp.bfloat16
    for primitive in ("rsqrt", "exp"):
        found = list(_equations(jaxpr.jaxpr, primitive))
        assert found and all(e.outvars[0].aval.dtype == jnp.float32 for e in found)


def _equations(jaxpr, name):
    for equation in jaxpr.eqns:
        if equation.primitive.name == name:
            yield equation
        for inner in inner_jaxprs(equation):
            yield from _equations(inner, name)
