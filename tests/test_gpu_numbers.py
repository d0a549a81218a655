"""What decides numbers and kernels on GPUs. What is marked a100 is compiled for GPUs that need not be there."""

import dataclasses
import importlib.util
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import needs_gpu_packages

from vocabpp_jax import Pipeline, compiled, make_mesh, models, schedules
from vocabpp_jax.pipeline import nccl
from vocabpp_jax.pipeline.model_interface import Model
from vocabpp_jax.schedules.simulation.cost import load_gpu

a100 = [pytest.mark.a100, needs_gpu_packages]
m = 2


def pipeline(model, dtype, method="vocab-2", devices=None, p=2):
    mesh = make_mesh(p, devices=devices or jax.devices()[:p])
    return Pipeline(model, schedules.build("1f1b", method, p=p, m=m), mesh, compute_dtype=dtype)


def inputs(pipe, length, documents=False):
    """Shapes of the parameters and of a batch, where they lie."""
    params = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        pipe.layout.shapes(),
        pipe.shardings,
    )
    tokens = jax.ShapeDtypeStruct((m, 1, length), jnp.int32)
    batch = {"tokens": tokens, "labels": tokens}
    return params, batch | ({"aux_inputs": {"segment_ids": tokens}} if documents else {})


def gpt(**options):
    options = dict(layers=2, hidden=64, heads=2, seq=64, vocab_size=97) | options
    return models.GPTConfig(**options)


# --- products --------------------------------------------------------------------------------------------------------


def products(jaxpr):
    """Every matrix product of a program: the dtypes of what is multiplied, and the precision."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield tuple(v.aval.dtype.name for v in equation.invars), equation.params["precision"]
        for value in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner)


EXACT = (jax.lax.Precision.HIGHEST,) * 2
ALL_OF_A_LOSS = models.GemmaConfig(
    layers=2, hidden=32, heads=2, kv_heads=1, head_size=16, inner=64, seq=16, vocab_size=97, window=8
)


@pytest.mark.parametrize("method", ["baseline", "vocab-1", "vocab-2", "vocab-naive"])
@pytest.mark.parametrize("config", [gpt(), ALL_OF_A_LOSS], ids=["gpt", "gemma"])
def test_every_product_of_a_float32_pipeline_is_exact(method, config):
    model = dataclasses.replace(
        models.build(config), loss=dataclasses.replace(config.loss, z_loss=1e-4, label_smoothing=0.1)
    )
    pipe = pipeline(model, "float32", method)
    found = set(products(jax.make_jaxpr(pipe.value_and_grad)(*inputs(pipe, 16)).jaxpr))
    found |= set(products(jax.make_jaxpr(pipe.evaluate)(*inputs(pipe, 16)).jaxpr))
    assert found == {(("float32", "float32"), EXACT)}


@pytest.mark.parametrize("method", ["baseline", "vocab-1", "vocab-2", "vocab-naive"])
def test_bfloat16_pipelines_multiply_in_bfloat16_by_whatever_kernel_is_fastest(method):
    pipe = pipeline(models.build(gpt(dtype="bfloat16")), "bfloat16", method)
    found = set(products(jax.make_jaxpr(pipe.value_and_grad)(*inputs(pipe, 16)).jaxpr))
    assert found == {(("bfloat16", "bfloat16"), None)}


def test_the_reference_is_as_exact_as_what_is_held_against_it():
    model = models.build(gpt())
    tokens = jnp.zeros((1, 1, 16), jnp.int32)
    both = jax.value_and_grad(lambda params: models.reference_loss(model, params, tokens, tokens))
    found = set(products(jax.make_jaxpr(both)(model.param_shapes()).jaxpr))
    assert found == {(("float32", "float32"), EXACT)}


def test_who_asks_for_tf32_gets_it():
    pipe = pipeline(models.build(gpt()), "float32")
    with jax.default_matmul_precision("tensorfloat32"):
        found = {p for _, p in products(jax.make_jaxpr(pipe.value_and_grad)(*inputs(pipe, 16)).jaxpr)}
    assert found == {(jax.lax.Precision.HIGH,) * 2}


# --- attention -------------------------------------------------------------------------------------------------------


def test_attention_follows_the_mesh_and_not_the_default_backend(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    pipe = pipeline(models.build(gpt(dtype="bfloat16")), "bfloat16")
    text = jax.jit(pipe.value_and_grad).lower(*inputs(pipe, 64)).as_text()
    assert "fmha" not in text


def test_cudnn_on_devices_that_have_none_is_refused():
    model = models.build(gpt(dtype="bfloat16", attention="cudnn"))
    with pytest.raises(ValueError, match="attention is 'cudnn', and the devices are of the platform 'cpu'; choose"):
        pipeline(model, "bfloat16")


def test_a_block_without_a_choice_of_kernels_needs_no_method():
    model = Model(
        layers=2,
        vocab_size=8,
        width=4,
        block=lambda w, x, aux_inputs: x * w,
        init_block=lambda key, layer: jnp.ones(4),
        init_row=lambda key, table: jnp.ones(4),
    )
    pipe = pipeline(model, "float32")
    assert jax.eval_shape(pipe.value_and_grad, *inputs(pipe, 4))[0].shape == ()


def a100_program(config, length, documents=False, gpu="a100-80g"):
    pipe = pipeline(models.build(config), config.dtype, devices=compiled.devices(load_gpu(gpu), 2))
    return jax.jit(pipe.value_and_grad).lower(*inputs(pipe, length, documents)).compile().as_text()


def largest_square(text, length):
    """The largest array with two axes of so many positions or more, in elements."""
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\w+\[([\d,]+)\]", text)}
    return max((int(np.prod(s)) for s in shapes if sum(n >= length for n in s) > 1), default=0)


class TestA100:
    pytestmark = [*a100, pytest.mark.newest]
    WIDE = dict(hidden=128, heads=2, seq=1100, dtype="bfloat16")

    @pytest.mark.parametrize("gpu", ["a100-80g", "h100-80g"])
    @pytest.mark.parametrize(("length", "documents"), [(1024, False), (1001, False), (1024, True), (1001, True)])
    def test_bfloat16_attention_is_cudnns_and_makes_no_square(self, gpu, length, documents):
        text = a100_program(gpt(**self.WIDE), length, documents, gpu)
        assert "__cudnn$fmha" in text and largest_square(text, length) == 0

    def test_attention_that_is_written_out_shows_what_a_square_would_look_like(self):
        text = a100_program(gpt(**self.WIDE, attention="xla"), 128)
        assert "__cudnn$fmha" not in text and largest_square(text, 128) > 0

    def test_no_product_of_float32_may_be_tf32(self):
        text = a100_program(gpt(), 64)
        # Small products stay in fusions, the others are the library's.
        products = [
            line.lower() for line in text.splitlines() if "__cublas$" in line or re.search(r"= f32\S* dot\(", line)
        ]
        assert products and all(re.search(r"operand_precision\W+highest\W+highest", line) for line in products)


# --- NCCL ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("plugin", "before", "after"), [(True, None, "1"), (True, "0", "0"), (False, None, None)])
def test_nccl_keeps_the_order_of_launches_unless_told_otherwise(monkeypatch, plugin, before, after):
    monkeypatch.delenv(nccl.LAUNCH_ORDER, raising=False)
    if before is not None:
        monkeypatch.setenv(nccl.LAUNCH_ORDER, before)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: plugin or None)
    pipeline(models.build(gpt()), "float32")
    assert os.environ.get(nccl.LAUNCH_ORDER) == after
