"""The train step: the same update whatever the layout, clipped by the norm over all of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vocabpp_jax import Pipeline, make_mesh, models, schedules, train
from vocabpp_jax.models import reference_loss
from vocabpp_jax.training.optimizer import matrices

M, B, L, V = 3, 2, 8, 29


def pipeline(schedule="1f1b", method="vocab-2", p=2, data=1, tied=False, dtype="float32") -> Pipeline:
    config = models.GPTConfig(layers=4, hidden=16, heads=2, seq=L, vocab_size=V, tie_embeddings=tied, dtype=dtype)
    devices = jax.devices()[: p * data]
    return Pipeline(
        models.build(config), schedules.build(schedule, method, p=p, m=M), make_mesh(p, data, devices), dtype
    )


def batches(steps: int):
    random = np.random.default_rng(0)
    for _ in range(steps):
        tokens, labels = (random.integers(0, V, (M, B, L), dtype=np.int32) for _ in range(2))
        yield {"tokens": tokens, "labels": labels, "mask": np.ones((M, B, L), np.float32)}


def trained(pipe: Pipeline, steps: int = 3, clip: float = 0.05):
    optimizer = optax.adamw(1e-2, weight_decay=0.1, mask=matrices)
    state, step = train.init_state(pipe, optimizer, jax.random.key(0)), train.make_step(pipe, optimizer, clip)
    measured = []
    for batch in batches(steps):
        state, metrics = step(state, batch)
        measured.append({k: float(v) for k, v in metrics.items()})
    return jax.device_get(pipe.layout.unpack(jax.device_get(state.params))), measured


def reference(pipe: Pipeline, steps: int = 3, clip: float = 0.05):
    """Plain optax on one device."""
    params = pipe.model.init(jax.random.key(0))
    decays = jax.tree.map(lambda w: w.ndim >= 2, params)
    optimizer = optax.chain(optax.clip_by_global_norm(clip), optax.adamw(1e-2, weight_decay=0.1, mask=decays))
    moments, measured = optimizer.init(params), []
    value_and_grad = jax.jit(jax.value_and_grad(lambda c, batch: reference_loss(pipe.model, c, **batch)))
    for batch in batches(steps):
        loss, grads = value_and_grad(params, jax.tree.map(jnp.asarray, batch))
        norm = np.sqrt(sum(float(jnp.sum(g * g)) for g in jax.tree.leaves(grads)))
        measured.append({"loss": float(loss), "grad_norm": norm})
        updates, moments = optimizer.update(grads, moments, params)
        params = optax.apply_updates(params, updates)
    return jax.device_get(params), measured


@pytest.mark.sampled(9)
@pytest.mark.parametrize(
    ("schedule", "method", "p", "data", "tied"),
    [
        ("1f1b", "vocab-2", 2, 1, False),
        ("1f1b", "baseline", 2, 2, True),
        ("v-half", "baseline", 2, 1, False),
        ("zb-h1", "vocab-1", 4, 2, True),
    ],
)
def test_three_clipped_steps_are_those_of_plain_optax_on_one_device(schedule, method, p, data, tied):
    pipe = pipeline(schedule, method, p, data, tied)
    (got, measured), (want, expected) = trained(pipe), reference(pipe)
    for a, b in zip(measured, expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    # Adam's first steps divide by tiny second moments, so parameters agree less closely than gradients do.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4), got, want)


@pytest.mark.thorough
def test_tied_copies_on_two_devices_stay_equal():
    pipe = pipeline(method="baseline", tied=True)
    optimizer = optax.adamw(1e-2)
    state, step = train.init_state(pipe, optimizer, jax.random.key(0)), train.make_step(pipe, optimizer)
    for batch in batches(2):
        state, _ = step(state, batch)
    table = np.asarray(state.params["embed"]["tokens"])
    np.testing.assert_array_equal(table[0], table[1])


@pytest.mark.thorough
def test_the_state_keeps_float32_masters_in_bfloat16_compute_and_is_donated():
    pipe = pipeline(dtype="bfloat16")
    optimizer = optax.adamw(1e-2)
    state, step = train.init_state(pipe, optimizer, jax.random.key(0)), train.make_step(pipe, optimizer)
    new, _ = step(state, next(batches(1)))
    floats = [w for w in jax.tree.leaves(new) if jnp.issubdtype(w.dtype, jnp.floating)]
    assert {w.dtype for w in floats} == {np.dtype("float32")}
    assert all(w.is_deleted() for w in jax.tree.leaves(state.params))


def test_the_same_key_gives_the_same_model_in_every_layout():
    models_made = [trained(pipeline(method=method, p=p), steps=0)[0] for method, p in (("vocab-2", 2), ("baseline", 4))]
    jax.tree.map(np.testing.assert_array_equal, *models_made)
