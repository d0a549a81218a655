"""The passes of a block: exact, without weights among what they store, and no dearer when split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vocabpp_jax import models
from vocabpp_jax.pipeline.linearize import linearize

B, L = 2, 8
CONFIG = dict(layers=2, hidden=32, heads=2, seq=L, vocab_size=64)


def gpt_block(residuals: str = "selective"):
    model = models.build(models.GPTConfig(**CONFIG, residuals=residuals))
    params = model.init(jax.random.key(0))["blocks"][0]
    params = jax.tree.map(lambda w: w + 0.1 * jax.random.normal(jax.random.key(1), w.shape), params)
    x, g = (jax.random.normal(jax.random.key(k), (B, L, 32)) for k in (2, 3))
    return model.block, params, x, g


def shapes(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def gradients(passes, params, aux_inputs, x, g):
    y, residual, kept = passes.forward(params, aux_inputs, x)
    dparams, dx, carried = passes.backward(params, aux_inputs, residual, kept, g)
    if passes.weights is not None:
        late = passes.weights(params, aux_inputs, kept, carried)
        dparams = jax.tree.map(lambda a, b: b if a is None else a, dparams, late, is_leaf=lambda a: a is None)
    return y, dparams, dx


@pytest.mark.sampled(3)
@pytest.mark.newest
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("residuals", ["everything", "selective", "full"])
def test_the_passes_of_a_block_are_its_vjp(residuals, split):
    block, params, x, g = gpt_block(residuals)
    passes = linearize(block, shapes(params), shapes(x), {}, split=split)
    want_y, vjp = jax.vjp(lambda p, x: block(p, x, {}), params, x)
    want = (want_y, *vjp(g))
    for got, value in zip(jax.tree.leaves(gradients(passes, params, {}, x, g)), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("split", [False, True])
def test_no_weight_and_no_mask_is_stored(split):
    block, params, x, _ = gpt_block()
    aux_inputs = {"segment_ids": jax.ShapeDtypeStruct((B, L), jnp.int32)}
    passes = linearize(block, shapes(params), shapes(x), aux_inputs, split=split)
    weights = {w.shape for w in jax.tree.leaves(params)} | {(B, 1, L, L)}
    stored = [*passes.residual, *passes.kept, *passes.carried]
    assert stored and all(s.shape not in weights and s.dtype != bool for s in stored)


def test_the_split_costs_no_more_than_two_percent_of_the_backward_and_stores_nothing_twice():
    model = models.build(models.GPTConfig(layers=1, hidden=256, heads=2, seq=128, vocab_size=64))
    params, x = model.param_shapes()["blocks"][0], jax.ShapeDtypeStruct((1, 128, 256), jnp.float32)

    def flops(function, *args):
        return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]

    whole, cut = (linearize(model.block, params, x, {}, split=s) for s in (False, True))
    unsplit = flops(whole.backward, params, {}, whole.residual, whole.kept, x)
    split = flops(cut.backward, params, {}, cut.residual, cut.kept, x) + flops(
        cut.weights, params, {}, cut.kept, cut.carried
    )
    assert split <= 1.02 * unsplit
    assert len(cut.residual) + len(cut.kept) == len(whole.residual)
    # The output gradients of qkv, out, up and down, each once.
    assert sum(s.size for s in cut.carried) == 128 * 256 * (3 + 1 + 4 + 1)


def test_a_block_that_changes_its_input_s_shape_is_refused():
    x = jax.ShapeDtypeStruct((B, L, 4), jnp.float32)
    with pytest.raises(ValueError, match=r"turns float32\[2, 8, 4\] into float32\[2, 8, 1\]"):
        linearize(lambda w, x, aux_inputs: x[..., :1] * w, jax.ShapeDtypeStruct((), jnp.float32), x, {}, split=False)


def test_what_a_nested_jit_makes_without_the_input_is_not_stored():
    def block(w, x, aux_inputs):
        return jax.jit(lambda x: x * jnp.cos(jnp.arange(L * 4.0)).reshape(L, 4))(x * w)

    w, x = jnp.full((4,), 2.0), jnp.ones((B, L, 4))
    passes = linearize(block, shapes(w), shapes(x), {}, split=False)
    assert [s.shape for s in (*passes.residual, *passes.kept)] == [(B, L, 4)]  # x alone
    np.testing.assert_allclose(gradients(passes, w, {}, x, x)[2], jax.vjp(lambda x: block(w, x, {}), x)[1](x)[0])


def test_a_block_without_matrices_can_be_split():
    w, x = jnp.full((4,), 2.0), jnp.ones((B, L, 4))
    passes = linearize(lambda w, x, aux_inputs: x * w, shapes(w), shapes(x), {}, split=True)
    _, dw, dx = gradients(passes, w, {}, x, x)
    np.testing.assert_allclose(dw, np.full(4, B * L))
    np.testing.assert_allclose(dx, 2 * np.ones(x.shape))
