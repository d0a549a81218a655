"""Layers of other libraries, layers with a loss of their own, and layers with dropout, held against one device."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_pipeline import assert_parity

from vocabpp_jax import Pipeline, make_mesh, schedules
from vocabpp_jax.models import reference_loss
from vocabpp_jax.models.adapters import from_nnx, from_pytree

V, D, LAYERS, M, B, L = 37, 8, 4, 4, 2, 5


class Mixer(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(D, 2 * D, rngs=rngs)
        self.down = nnx.Linear(2 * D, D, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(x)))


class Layer(eqx.Module):
    norm: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP

    def __init__(self, key):
        self.norm = eqx.nn.LayerNorm(D)
        self.mlp = eqx.nn.MLP(D, D, 2 * D, 1, key=key)

    def __call__(self, x):
        return x + self.mlp(self.norm(x))


class Routed(Mixer):
    """Two experts that a router mixes, with the product of their mean weights as what balances them."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.router = nnx.Linear(D, 2, use_bias=False, rngs=rngs)

    def __call__(self, x):
        share = jax.nn.softmax(self.router(x), -1)
        return x + share[..., :1] * super().__call__(x), 0.1 * 2 * jnp.sum(jnp.mean(share, (0, 1)) ** 2)


def dropped(layer, x, aux_inputs):
    """Drops half of a layer's output; every sequence has a key, and every layer a number."""
    keys = jax.vmap(lambda key: jax.random.fold_in(jax.random.wrap_key_data(key), aux_inputs["layer"]))
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (L, D)))(keys(aux_inputs["keys"]))
    return x + jnp.where(kept, 2 * (layer(x) - x), 0)


SIZES = dict(layers=LAYERS, vocab_size=V, width=D, init_std=0.5)
MODELS = {
    "nnx": lambda: from_nnx(Mixer, **SIZES, tied=True),
    "equinox": lambda: from_pytree(Layer, call=lambda layer, x, _: jax.vmap(jax.vmap(layer))(x), **SIZES),
    "auxiliary": lambda: from_nnx(Routed, **SIZES, auxiliary=True),
    "dropout": lambda: from_nnx(
        Mixer, call=dropped, **SIZES, layer_aux_inputs=tuple({"layer": np.int32(n)} for n in range(LAYERS))
    ),
}


def batch_of(keys: bool):
    random = np.random.default_rng(0)
    text = random.integers(0, V, (M, B, L + 1))
    batch = {"tokens": text[..., :-1], "labels": text[..., 1:]}
    seeds = random.integers(0, 2**32, (M, B, 2), dtype=np.uint32)
    return batch | ({"aux_inputs": {"keys": seeds}} if keys else {})


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("schedule", "method"), [("1f1b", "vocab-2"), ("v-half", "baseline")])
def test_a_layer_of_one_s_own_computes_what_one_device_computes(name, schedule, method):
    pipe = Pipeline(
        MODELS[name](), schedules.build(schedule, method, p=2, m=M), make_mesh(2, devices=jax.devices()[:2])
    )
    assert_parity(pipe, batch_of(name == "dropout"))


def test_a_scalar_joins_the_loss_in_training_and_not_in_evaluation():
    pipe = Pipeline(MODELS["auxiliary"](), schedules.build(p=2, m=M), make_mesh(2, devices=jax.devices()[:2]))
    params = pipe.init(jax.random.key(0))
    trained = pipe.jit(pipe.value_and_grad)(params, batch_of(False))[0]
    evaluated = pipe.jit(pipe.evaluate)(params, batch_of(False))
    assert 0.1 * LAYERS <= trained - evaluated <= 0.2 * LAYERS + 1e-6


@pytest.mark.parametrize(("schedule", "data"), [("1f1b", 1), ("zb-h1", 2)])
def test_a_parameter_is_taken_in_a_dtype_of_its_own(schedule, data):
    model = from_nnx(Mixer, **SIZES, param_dtype=lambda name: "bfloat16" if name == "blocks/up/kernel" else None)
    mesh = make_mesh(2, data=data, devices=jax.devices()[: 2 * data])
    pipe = Pipeline(model, schedules.build(schedule, "vocab-2", p=2, m=M), mesh)
    params = model.init(jax.random.key(0))
    loss, grads = pipe.jit(pipe.value_and_grad)(pipe.shard(params), batch_of(False))

    def as_taken(params):
        def up(block):
            kernel = block["up"]["kernel"].astype(jnp.bfloat16).astype(jnp.float32)
            return block | {"up": block["up"] | {"kernel": kernel}}

        return params | {"blocks": tuple(map(up, params["blocks"]))}

    want_loss, want = jax.value_and_grad(lambda c: reference_loss(model, c, **batch_of(False)))(as_taken(params))
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    assert abs(loss - reference_loss(model, params, **batch_of(False))) > 1e-5
    for (path, got), value in zip(
        jax.tree.leaves_with_path(pipe.layout.unpack(jax.device_get(grads))), jax.tree.leaves(want), strict=True
    ):
        rounded = "up" in jax.tree_util.keystr(path) and "kernel" in jax.tree_util.keystr(path)
        assert np.linalg.norm(got - value) <= (2**-8 if rounded else 1e-5) * np.linalg.norm(value), path


def test_a_router_computes_in_float32_among_layers_in_bfloat16():
    seen = set()

    def call(layer, x, aux_inputs):
        seen.add((str(x.dtype), str(layer.router.kernel[...].dtype), str(layer.up.kernel[...].dtype)))
        share = jax.nn.softmax(layer.router(x), -1)
        return (x + share[..., :1] * Mixer.__call__(layer, x)).astype(x.dtype)

    model = from_nnx(Routed, call=call, **SIZES, param_dtype=lambda name: "float32" if "router" in name else None)
    pipe = Pipeline(model, schedules.build(p=2, m=M), make_mesh(2, devices=jax.devices()[:2]), "bfloat16")
    assert pipe.activation_bytes(B, L)["residual"] > 0
    grads = pipe.jit(pipe.value_and_grad)(pipe.init(jax.random.key(0)), batch_of(False))[1]
    assert seen == {("bfloat16", "float32", "bfloat16")}
    assert all(g.dtype == jnp.float32 and jnp.isfinite(g).all() for g in jax.tree.leaves(grads))
    odd = from_nnx(Mixer, **SIZES, param_dtype=lambda name: "float16")
    pipe = Pipeline(odd, schedules.build(p=2, m=M), make_mesh(2, devices=jax.devices()[:2]))
    with pytest.raises(ValueError, match="param_dtype gives float16 for 'blocks/down/kernel'; it must be float32 or"):
        pipe.activation_bytes(B, L)


def test_what_cannot_be_a_layer_is_refused():
    with pytest.raises(ValueError, match="a layer has no parameters: tuple has no floating-point array"):
        from_pytree(lambda key: (1, 2), **SIZES)
    odd = from_nnx(Mixer, call=lambda layer, x, _: (layer(x), x), **SIZES)
    pipe = Pipeline(odd, schedules.build(p=2, m=M), make_mesh(2, devices=jax.devices()[:2]))
    with pytest.raises(ValueError, match=r"block returns float32\[2, 5, 8\] besides the stream; it may return one"):
        jax.eval_shape(pipe.value_and_grad, pipe.layout.shapes(), batch_of(False))
