"""The single-device reference against arithmetic that shares nothing with it: float64 numpy and closed forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vocabpp_jax.models import GPTConfig, build, reference_logits, reference_loss, reference_sums
from vocabpp_jax.pipeline.model_interface import Model

CONFIG = GPTConfig(layers=2, hidden=16, heads=2, seq=8, vocab_size=23)
m, B, L, V = 4, 2, CONFIG.seq, CONFIG.vocab_size
VALUE_AND_GRAD = jax.jit(jax.value_and_grad(reference_loss, argnums=1), static_argnums=0, static_argnames="dtype")


def linear_model(**kwargs):
    """The smallest model: one block that adds a matrix product, and no norm."""

    return Model(
        layers=1,
        vocab_size=V,
        width=5,
        init_block=lambda key, layer: jnp.zeros((5, 5)),
        init_row=lambda key, table: jnp.zeros(5),
        block=lambda w, x, aux_inputs: x + x @ w,
        **kwargs,
    )


LINEAR = linear_model()  # one object for all tests, so that it is compiled once


def random_params(model, std=0.2):
    """Parameters with nothing at its special initial value: no zero bias, no unit scale."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: jnp.asarray(std * rng.normal(size=a.shape), a.dtype), model.param_shapes())


def random_batch(seed=0, share_valid=0.6):
    rng = np.random.default_rng(seed)
    tokens, labels = rng.integers(0, V, (2, m, B, L))
    mask = rng.random((m, B, L)) < share_valid
    mask[0] = True  # unequal counts, so that a mean of means would show
    mask[1, :, 1:] = False
    return tokens, labels, mask


def numpy_norm(p, x):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def numpy_block(config, p, x, allowed):
    """One layer in float64 numpy, for one row ``x [L, D]``; ``allowed [L, L]`` says who sees whom."""
    heads, width = config.heads, config.hidden // config.heads
    qkv = numpy_norm(p["attention"]["norm"], x) @ p["attention"]["qkv"]["kernel"] + p["attention"]["qkv"]["bias"]
    out = np.zeros_like(x)
    for i in range(heads):
        columns = slice(i * width, (i + 1) * width)
        q, k, v = np.split(qkv[:, 3 * i * width : 3 * (i + 1) * width], 3, axis=-1)
        scores = np.where(allowed, q @ k.T / np.sqrt(width), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, columns] = weights / weights.sum(-1, keepdims=True) @ v
    x = x + out @ p["attention"]["out"]["kernel"] + p["attention"]["out"]["bias"]
    u = numpy_norm(p["mlp"]["norm"], x) @ p["mlp"]["up"]["kernel"] + p["mlp"]["up"]["bias"]
    u = 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
    return x + u @ p["mlp"]["down"]["kernel"] + p["mlp"]["down"]["bias"]


def numpy_gpt_logits(config, params, tokens, segment_ids=None):
    """A GPT forward pass in float64 numpy, for one row ``tokens [L]`` at a time: ``[L, V]``, and for every depth of the
    tail ``[L - k, V]``, each a list's entry."""
    n = len(tokens)
    ids = np.zeros(n, int) if segment_ids is None else segment_ids
    allowed = np.tril(np.ones((n, n), bool)) & (ids[:, None] == ids[None])
    embedded = params["embed"]["tokens"][tokens] + params["embed"]["positions"][:n]
    x = embedded
    for p in params["blocks"]:
        x = numpy_block(config, p, x, allowed)
    streams = [x]
    for k, p in enumerate(params.get("tail", ()), start=1):
        # Only positions whose token k places ahead exists, as published.
        x = np.concatenate(
            [numpy_norm(p["stream_norm"], x[: n - k]), numpy_norm(p["token_norm"], embedded[k:])], axis=-1
        )
        x = numpy_block(config, p["block"], x @ p["project"]["kernel"], allowed[: n - k, : n - k])
        streams.append(x)
    head = params["embed"]["tokens"] if config.tie_embeddings else params["head"]
    return [numpy_norm(params["final"], x) @ head.T for x in streams]


def numpy_loss(logits, labels, mask):
    """Mean negative log likelihood in float64; ``logits [..., V]``."""
    logits = np.asarray(logits, np.float64)
    top = logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    nll = log_sum - np.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return nll[mask].mean()


@pytest.mark.parametrize(("tied", "packed"), [(False, False), (True, True)])
def test_gpt_logits_and_loss_equal_a_gpt_written_in_numpy(tied, packed):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    model = build(config)
    params = random_params(model)
    exact_params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    tokens, labels, mask = random_batch()
    ids = np.broadcast_to(np.arange(L) // 3, (m, B, L)) if packed else None
    exact = np.stack([
        [numpy_gpt_logits(config, exact_params, tokens[i, j], ids[i, j] if packed else None)[0] for j in range(B)]
        for i in range(m)
    ])  # fmt: skip

    aux_inputs = {"segment_ids": ids} if packed else {}
    first = {name: array[0] for name, array in aux_inputs.items()}
    logits = jax.jit(reference_logits, static_argnums=0)(model, params, tokens[0], first)
    np.testing.assert_allclose(logits, exact[0], atol=1e-5)
    loss = reference_loss(model, params, tokens, labels, mask, aux_inputs)
    np.testing.assert_allclose(loss, numpy_loss(exact, labels, mask), rtol=1e-6)


@pytest.mark.parametrize(("depths", "packed"), [(1, False), (2, True)])
def test_further_tokens_are_predicted_as_published(depths, packed):
    model = build(CONFIG, mtp_depth=depths, mtp_weight=0.7)
    params = random_params(model)
    exact_params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    tokens, labels, mask = random_batch(share_valid=0.9)
    ids = np.broadcast_to(np.arange(L) // 3, (m, B, L)) if packed else np.zeros((m, B, L), int)
    sums = np.zeros(1 + depths)
    counts = np.zeros(1 + depths, int)
    for i, j in np.ndindex(m, B):
        for k, logits in enumerate(numpy_gpt_logits(CONFIG, exact_params, tokens[i, j], ids[i, j])):
            for n, row in enumerate(logits):
                if mask[i, j, n + k] and ids[i, j, n] == ids[i, j, n + k]:
                    sums[k] += np.log(np.exp(row).sum()) - row[labels[i, j, n + k]]
                    counts[k] += 1
    want = (sums[0] + 0.7 / depths * sums[1:].sum()) / counts[0]
    aux_inputs = {"segment_ids": ids} if packed else {}
    got, counted, _ = reference_sums(model, params, tokens, labels, mask, aux_inputs)
    np.testing.assert_allclose(got, sums, rtol=1e-5)
    np.testing.assert_array_equal(counted, counts)
    np.testing.assert_allclose(reference_loss(model, params, tokens, labels, mask, aux_inputs), want, rtol=1e-5)


def test_loss_is_the_mean_over_the_global_batch_not_a_mean_of_means():
    model = LINEAR
    params = random_params(model, std=1.0)
    tokens, labels, mask = random_batch()
    logits = np.stack([reference_logits(model, params, tokens[i], {}) for i in range(m)])
    loss = reference_loss(model, params, tokens, labels, mask)
    np.testing.assert_allclose(loss, numpy_loss(logits, labels, mask), rtol=1e-6)
    means = np.mean([numpy_loss(logits[i], labels[i], mask[i]) for i in range(m)])
    assert abs(means - loss) > 1e-2
    np.testing.assert_allclose(
        reference_loss(model, params, tokens, labels), numpy_loss(logits, labels, np.ones_like(mask)), rtol=1e-6
    )


@pytest.mark.parametrize("split", [(1, 8), (8, 1)])
def test_grouping_into_microbatches_changes_nothing(split):
    model = LINEAR
    params = random_params(model, std=1.0)
    batch = random_batch()
    loss, gradients = VALUE_AND_GRAD(model, params, *batch)
    again, gradients_again = VALUE_AND_GRAD(model, params, *(a.reshape(*split, L) for a in batch))
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    for a, e in zip(jax.tree.leaves(gradients_again), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(a, e, atol=1e-6)


def test_masked_labels_may_be_anything():
    model = LINEAR
    params = random_params(model, std=1.0)
    tokens, labels, mask = random_batch()
    expected = jax.tree.leaves(VALUE_AND_GRAD(model, params, tokens, labels, mask))
    for other in (-100, -1, V, 10**6):
        changed = jax.tree.leaves(VALUE_AND_GRAD(model, params, tokens, np.where(mask, labels, other), mask))
        assert all(np.array_equal(a, e) for a, e in zip(changed, expected, strict=True))


def test_no_valid_token_gives_zero_loss_and_zero_gradients():
    model = LINEAR
    tokens, labels, mask = random_batch()
    params = random_params(model, std=1.0)
    results = VALUE_AND_GRAD(model, params, tokens, labels, np.zeros_like(mask))
    assert all(not np.any(a) for a in jax.tree.leaves(results))


def test_head_gradient_is_softmax_minus_one_hot_times_the_hidden_state():
    """∇W = (softmax - G)ᵀ X over the valid tokens, divided by their number."""
    model = LINEAR
    params = random_params(model, std=1.0)
    tokens, labels, mask = random_batch()
    gradient = VALUE_AND_GRAD(model, params, tokens, labels, mask)[1]["head"]
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x = params["embed"]["tokens"][tokens[mask]]
    x = x + x @ params["blocks"][0]
    softmax = np.exp(x @ params["head"].T)
    softmax /= softmax.sum(-1, keepdims=True)
    np.testing.assert_allclose(gradient, (softmax - np.eye(V)[labels[mask]]).T @ x / mask.sum(), atol=1e-6)


def test_tied_gradient_is_the_sum_of_the_untied_ones():
    tied, untied = linear_model(tied=True), LINEAR
    params = random_params(tied, std=1.0)
    batch = random_batch()
    both = VALUE_AND_GRAD(tied, params, *batch)[1]["embed"]["tokens"]
    split = VALUE_AND_GRAD(untied, {**params, "head": params["embed"]["tokens"]}, *batch)[1]
    np.testing.assert_allclose(both, split["embed"]["tokens"] + split["head"], atol=1e-6)


def test_embed_scale_multiplies_tokens_and_not_positions():
    model = linear_model(embed_scale=3.0, positions=L)
    params = random_params(model, std=1.0)
    tokens = random_batch()[0][0]
    x = 3 * np.asarray(params["embed"]["tokens"])[tokens] + np.asarray(params["embed"]["positions"])
    x = x + x @ np.asarray(params["blocks"][0])
    np.testing.assert_allclose(reference_logits(model, params, tokens, {}), x @ np.asarray(params["head"]).T, atol=1e-4)


def test_side_arrays_reach_the_blocks_of_their_microbatch():
    model = dataclasses.replace(LINEAR, block=lambda w, x, aux_inputs: x + aux_inputs["shift"][:, None, None])
    params = random_params(model, std=1.0)
    tokens, labels, mask = random_batch()
    shift = np.arange(m * B, dtype=np.float32).reshape(m, B) / 10
    logits = np.stack([reference_logits(model, params, tokens[i], {"shift": shift[i]}) for i in range(m)])
    loss = reference_loss(model, params, tokens, labels, mask, {"shift": shift})
    np.testing.assert_allclose(loss, numpy_loss(logits, labels, mask), rtol=1e-6)
    assert abs(loss - reference_loss(model, params, tokens, labels, mask, {"shift": 0 * shift})) > 1e-2


def test_casting_rounds_the_parameters_and_keeps_the_loss_float32():
    model = LINEAR
    params = random_params(model)
    batch = random_batch()
    loss, gradients = VALUE_AND_GRAD(model, params, *batch, dtype="bfloat16")
    assert loss.dtype == jnp.float32
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(gradients))
    exact = reference_loss(model, params, *batch)
    assert 0 < abs(loss - exact) < 0.02 * exact
    rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    np.testing.assert_allclose(loss, reference_loss(model, rounded, *batch), rtol=1e-4)
