"""The axis ``tensor``: what is where, what is summed and how often, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from vocabpp_jax import Layout, Loss, Pipeline, make_mesh, models, schedules, train
from vocabpp_jax.models import huggingface
from vocabpp_jax.pipeline.linearize import linearize
from vocabpp_jax.pipeline.tensor import TENSOR, enter, leave
from vocabpp_jax.training.optimizer import adamw

SHAPE = dict(layers=2, hidden=16, heads=4, kv_heads=2, head_size=6, inner=20, seq=6, vocab_size=37)
CONFIGS = {
    "gpt": models.GPTConfig(layers=2, hidden=16, heads=4, seq=6, vocab_size=37),
    "llama": models.LlamaConfig(**SHAPE),
    "qwen3": models.QwenConfig(**SHAPE),
    "gemma2": models.GemmaConfig(**SHAPE, window=4, query_scalar=6),
}


def pipeline(config, tensor=2, method="vocab-2", schedule="1f1b", p=2, data=1):
    devices = jax.devices()[: p * tensor * data]
    built = schedules.build(schedule, method, p=p, m=3)
    return Pipeline(models.build(config), built, make_mesh(p, data, devices, tensor=tensor))


def on_two(function, *args):
    specs = PartitionSpec(TENSOR)
    mesh = Mesh(np.array(jax.devices()[:2]), (TENSOR,))
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False))(*args)


def test_enter_and_leave_are_each_other_s_transpose():
    x = jnp.arange(6.0)
    np.testing.assert_array_equal(on_two(lambda x: leave(x, TENSOR), x), [3, 5, 7, 3, 5, 7])
    np.testing.assert_array_equal(on_two(lambda x: jax.vjp(lambda x: leave(x, TENSOR), x)[1](x)[0], x), x)
    np.testing.assert_array_equal(on_two(lambda x: enter(x, TENSOR), x), x)
    transposed = on_two(lambda x: jax.vjp(lambda x: enter(x, TENSOR), x)[1](x)[0], x)
    np.testing.assert_array_equal(transposed, [3, 5, 7, 3, 5, 7])
    assert enter(x, None) is x and leave(x, None) is x


@pytest.mark.parametrize("name", CONFIGS)
def test_a_layer_sums_twice_forward_and_twice_backward_and_never_in_w(name):
    pipe = pipeline(CONFIGS[name])
    aux_inputs = pipe.model.layer_aux_inputs[0] if pipe.model.layer_aux_inputs else {}
    counts = {}

    def trace(layer):
        like = lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a))  # noqa: E731
        params = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape[1:], w.dtype), layer)
        x = jax.ShapeDtypeStruct((1, 6, 16), jnp.float32)
        passes = linearize(pipe.model.tensor.block, params, x, jax.tree.map(like, aux_inputs), split=True)
        sides = jax.tree.map(like, aux_inputs)
        for label, jaxpr in {
            "F": jax.make_jaxpr(passes.forward)(params, sides, x),
            "B": jax.make_jaxpr(passes.backward)(params, sides, passes.residual, passes.kept, x),
            "W": jax.make_jaxpr(passes.weights)(params, sides, passes.kept, passes.carried),
        }.items():
            shapes = [e.outvars[0].aval.shape for e in _sums(jaxpr.jaxpr)]
            counts[label] = shapes.count((1, 6, 16)), len(shapes)

    specs = pipe.layout.specs()["blocks"][0][0]
    layer = pipe.layout.shapes()["blocks"][0][0]
    jax.eval_shape(jax.shard_map(trace, mesh=pipe.mesh, in_specs=(specs,), out_specs=None, check_vma=False), layer)
    heads = 2 if name == "qwen3" else 0  # the gradients of the norms that all heads share
    assert counts == {"F": (2, 2), "B": (2, 2 + heads), "W": (0, 0)}


def _sums(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name.startswith("psum"):
            yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _sums(inner)


def test_every_device_has_its_part_of_the_layers_and_its_shard_of_the_vocabulary():
    pipe = pipeline(CONFIGS["llama"])
    params = pipe.shard(pipe.model.init(jax.random.key(0)))
    layer = params["blocks"][0][0]
    parts = {
        ("attention", "q", "kernel"): (1, 16, 12),
        ("attention", "k", "kernel"): (1, 16, 6),
        ("attention", "out", "kernel"): (1, 12, 16),
        ("mlp", "gate", "kernel"): (1, 16, 10),
        ("mlp", "down", "kernel"): (1, 10, 16),
        ("mlp", "norm", "scale"): (1, 16),
    }
    for path, shape in parts.items():
        leaf = layer
        for key in path:
            leaf = leaf[key]
        assert {s.data.shape for s in leaf.addressable_shards} == {shape}, path
    head = params["head"]
    assert head.shape == (64, 16) and {s.data.shape for s in head.addressable_shards} == {(16, 16)}
    # Consecutive rows lie on consecutive devices: tensor within pipe.
    starts = {s.device.id: s.index[0].start or 0 for s in head.addressable_shards}
    assert [starts[d.id] for d in pipe.mesh.devices.flat] == [0, 16, 32, 48]


def test_activations_in_flight_are_about_halved_but_for_the_stream():
    config = dataclasses.replace(CONFIGS["llama"], seq=64)
    whole, half = (pipeline(config, tensor=t).activation_bytes(1, 64)["residual"] for t in (1, 2))
    assert 0.5 < half / whole < 0.7


@pytest.mark.thorough
def test_a_step_is_the_same_step_with_and_without_the_axis():
    config = CONFIGS["llama"]
    tokens = np.random.default_rng(0).integers(0, 37, (3, 2, 7)).astype(np.int32)
    batch = {"tokens": tokens[..., :-1], "labels": tokens[..., 1:]}
    after = []
    for tensor in (1, 2):
        pipe = pipeline(config, tensor, p=1)
        optimizer = adamw(peak_lr=1e-2, steps=4, warmup=1)
        step = train.make_step(pipe, optimizer, clip=0.1)
        state = train.init_state(pipe, optimizer, jax.random.key(0))
        for _ in range(2):
            state, metrics = step(state, batch)
        after.append((metrics, pipe.layout.unpack(jax.device_get(state.params))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), *after)


def test_evaluation_is_the_cross_entropy_whatever_training_adds_to_it():
    model = dataclasses.replace(models.build(CONFIGS["gemma2"]), loss=Loss(2.0, z_loss=0.1, label_smoothing=0.3))
    plain = dataclasses.replace(model, loss=Loss(2.0))
    pipe = dataclasses.replace(pipeline(CONFIGS["gemma2"]), model=model)
    tokens, labels = np.random.default_rng(0).integers(0, 37, (2, 3, 2, 6)).astype(np.int32)
    params = model.init(jax.random.key(0))
    got = pipe.jit(pipe.evaluate)(pipe.shard(params), {"tokens": tokens, "labels": labels})
    want, trained = (float(models.reference_loss(m, params, tokens, labels)) for m in (plain, model))
    assert float(got) == pytest.approx(want, rel=1e-6) and abs(want - trained) > 0.1


@pytest.mark.parametrize(("name", "schedule", "method"), [("gpt", "v-half", "vocab-1"), ("qwen3", "1f1b", "baseline")])
def test_weights_are_read_part_by_part_and_written_back_bit_by_bit(name, schedule, method, tmp_path):
    config = dataclasses.replace(CONFIGS[name], layers=4)
    pipe = pipeline(config, schedule=schedule, method=method)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda s: random.normal(size=s.shape).astype(np.float32), pipe.model.param_shapes())
    huggingface.save(tmp_path / "in", config, params)
    loaded = huggingface.load(tmp_path / "in", pipe)
    jax.tree.map(np.testing.assert_array_equal, loaded, pipe.layout.pack(params))
    huggingface.save(tmp_path / "out", config, loaded, pipe)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "in/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("config", "tensor", "said"),
    [
        (CONFIGS["llama"], 4, "tensor is 4; it must divide a layer's 2 parts"),
        (dataclasses.replace(CONFIGS["llama"], inner=21), 2, "tensor is 2; it must divide 21, an axis of mlp.down"),
    ],
)
def test_what_cannot_be_split_is_refused(config, tensor, said):
    with pytest.raises(ValueError, match=said):
        Layout(models.build(config), schedules.build("1f1b", "vocab-2", p=2, m=3), tensor)


def test_a_model_that_says_nothing_of_the_axis_is_refused_on_it():
    model = dataclasses.replace(models.build(CONFIGS["gpt"]), tensor=None)
    with pytest.raises(ValueError, match="tensor is 2; this model does not support a tensor axis"):
        Layout(model, schedules.build("1f1b", "vocab-2", p=2, m=3), 2)


def test_devices_that_do_not_suffice_are_refused():
    with pytest.raises(ValueError, match="pipe is 4, tensor 3, and there are 8 devices"):
        make_mesh(4, tensor=3)
