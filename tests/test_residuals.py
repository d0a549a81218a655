"""What a GPT block's backward keeps, and what it computes again."""

import dataclasses
import math
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from test_models import CONFIG

from vocabpp_jax.models import GPTConfig, build, layer_flops, named

B, L, D = 2, CONFIG.seq, CONFIG.hidden


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


@pytest.mark.parametrize("mlp_ratio", [1, 4])
def test_layer_flops_are_those_of_its_matrix_products(mlp_ratio):
    config = dataclasses.replace(CONFIG, mlp_ratio=mlp_ratio)
    _, both = forward_and_backward(config)
    assert sum(2 * size * count for size, count in matrix_products(both).items()) == layer_flops(config, batch=B)
