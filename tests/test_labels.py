"""A label of -100 does not count, in every method; other ids outside the vocabulary never train."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_pipeline import V, batch_of, pipeline, plain_model

from vocabpp_jax import schedules, train
from vocabpp_jax.models import reference_logits, reference_loss
from vocabpp_jax.vocab import IGNORED_LABEL, Loss

METHODS = [
    ("1f1b", "baseline", "plain", True),
    ("1f1b", "redis", "all", False),
    ("1f1b", "interlaced", "plain", False),
    ("1f1b", "vocab-1", "all", False),
    ("1f1b", "vocab-2", "plain", True),
    ("1f1b", "vocab-naive", "plain", False),
    ("v-half", "vocab-2", "all", False),
]
LOSSES = {"plain": Loss(), "all": Loss(soft_cap=5.0, z_loss=1e-2, label_smoothing=0.1)}


def ignoring(batch, seed=1):
    """The batch with some labels ignored, and the same batch with these masked out instead."""
    ignored = np.random.default_rng(seed).random(batch["labels"].shape) > 0.6
    labels = np.where(ignored, IGNORED_LABEL, batch["labels"]).astype(np.int32)
    return batch | {"labels": labels}, batch | {"mask": np.where(ignored, 0, batch["mask"]).astype(np.float32)}


def made(schedule, method, loss, tied, p=2, m=2, data=1):
    counts = (3, 1) if method == "redis" else None
    built = schedules.build(schedule, method, p=p, m=m, layer_counts=counts)
    model = dataclasses.replace(plain_model(4, tied), loss=LOSSES[loss])
    return pipeline(built, model, data)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("schedule", "method", "loss", "tied"), METHODS)
def test_ignored_labels_are_masked_labels_and_the_loss_is_the_references(schedule, method, loss, tied):
    pipe = made(schedule, method, loss, tied)
    ignored, masked = ignoring(batch_of(2))
    canonical = pipe.model.init(jax.random.key(0))
    params, run = pipe.shard(canonical), jax.jit(pipe.value_and_grad)
    got = run(params, ignored)
    jax.tree.map(np.testing.assert_array_equal, got, run(params, masked))
    want, grads = jax.jit(jax.value_and_grad(lambda c: reference_loss(pipe.model, c, **ignored)))(canonical)
    np.testing.assert_allclose(got[0], want, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(pipe.layout.unpack(jax.device_get(got[1]))), jax.tree.leaves(grads), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


def test_the_mean_is_over_the_labels_that_count_on_all_copies():
    pipe = made("1f1b", "vocab-2", "plain", False, data=2)
    batch, _ = ignoring(batch_of(2, data=2))
    del batch["mask"]
    canonical = pipe.model.init(jax.random.key(0))
    loss = jax.jit(pipe.evaluate)(pipe.shard(canonical), batch)
    logits = [reference_logits(pipe.model, canonical, tokens, {}) for tokens in batch["tokens"]]
    nll = -jax.nn.log_softmax(jnp.stack(logits))
    counts = batch["labels"] != IGNORED_LABEL
    picked = np.take_along_axis(np.asarray(nll), np.where(counts, batch["labels"], 0)[..., None], -1)[..., 0]
    np.testing.assert_allclose(loss, picked[counts].mean(), rtol=1e-5)


@pytest.mark.parametrize("method", ["baseline", "vocab-2"])
def test_a_batch_of_ignored_labels_alone_has_no_loss_and_no_gradient(method):
    pipe = made("1f1b", method, "plain", False)
    batch = batch_of(2) | {"labels": np.full((2, 2, 4), IGNORED_LABEL, np.int32)}
    loss, grads = jax.jit(pipe.value_and_grad)(pipe.shard(pipe.model.init(jax.random.key(0))), batch)
    assert loss == 0 and all(not np.any(g) for g in jax.tree.leaves(jax.device_get(grads)))


def spoilt(batch, name, value):
    ids = batch[name].copy()
    ids[-1, 0, 1] = value
    return {"tokens": batch["tokens"], "labels": batch["labels"]} | {name: ids}


def test_an_id_outside_the_vocabulary_is_refused_and_within_jit_trains_nothing():
    pipe, optimizer = made("1f1b", "vocab-2", "plain", False), optax.adamw(1e-2)
    state, step = train.init_state(pipe, optimizer, jax.random.key(0)), train.make_step(pipe, optimizer)
    before = jax.device_get(state.params)
    for n, (name, value) in enumerate(itertools.product(("tokens", "labels"), (-1, -99, V, 10**6)), start=1):
        batch = spoilt(batch_of(2), name, value)
        with pytest.raises(ValueError, match=rf"{name} has the id {value}; ids are 0 to {V - 1}"):
            pipe.value_and_grad(state.params, batch)
        state, metrics = step(state, batch)
        assert jnp.isnan(metrics["loss"]) and metrics["skipped"] == n
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), before)


def test_masked_labels_outside_the_vocabulary_are_not_refused():
    pipe, batch = made("1f1b", "vocab-2", "plain", False), batch_of(2)
    labels = np.where(batch["mask"] > 0, batch["labels"], 10**6).astype(np.int32)
    params = pipe.shard(pipe.model.init(jax.random.key(0)))
    assert jnp.isfinite(jax.jit(pipe.evaluate)(params, batch | {"labels": labels}))


def test_narrow_and_unsigned_ids_are_ids_and_floats_are_not():
    pipe, batch = made("1f1b", "vocab-2", "plain", False), batch_of(2)
    params = pipe.shard(pipe.model.init(jax.random.key(0)))
    narrow = batch | {name: batch[name].astype(np.uint8) for name in ("tokens", "labels")}
    evaluate = jax.jit(pipe.evaluate)
    assert evaluate(params, narrow) == evaluate(params, batch)
    with pytest.raises(ValueError, match="labels has dtype float32; token ids are integers"):
        pipe.evaluate(params, batch | {"labels": batch["labels"].astype(np.float32)})
