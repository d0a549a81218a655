"""The vocabulary layers on shards of one array, held against a plain softmax cross-entropy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vocabpp_jax import vocab
from vocabpp_jax.vocab import Shard, Stats, output_layer

N, D = 7, 5


def problem(V: int, seed: int = 0):
    random = np.random.default_rng(seed)
    w, x = (jnp.asarray(random.normal(size=s), jnp.float32) for s in ((V, D), (N, D)))
    return w, x, jnp.asarray(random.integers(0, V, N), jnp.int32), jnp.asarray(random.random(N), jnp.float32)


def shards(w: jax.Array, p: int) -> list[tuple[jax.Array, Shard]]:
    """The rows of a table on p devices, padded with rows that would win every softmax were they not masked."""
    rows = -(-w.shape[0] // p)
    padded = jnp.pad(w, ((0, rows * p - w.shape[0]), (0, 0)), constant_values=100.0)
    return [(padded[k * rows : (k + 1) * rows], Shard(k * rows, w.shape[0])) for k in range(p)]


def reference(w, x, labels, weight):
    def loss(w, x):
        return jnp.sum(weight * -jax.nn.log_softmax(x @ w.T)[jnp.arange(N), labels])

    value, (dw, dx) = jax.value_and_grad(loss, (0, 1))(w, x)
    return value, dw, dx


def algorithm(number: int, w, x, labels, weight, p):
    """Loss, weight gradient and input gradient by Algorithm 1 or 2 over p shards."""
    parts = shards(w, p)
    local = [vocab.local_softmax(vocab.logits(wk, x, s), labels, s, jnp.float32) for wk, s in parts]
    whole = vocab.combine(jax.tree.map(lambda *xs: jnp.stack(xs), *(stats for _, stats in local)))
    dw, dx = [], 0
    for (wk, s), (soft, stats) in zip(parts, local, strict=True):
        scale = vocab.factor(stats, whole)
        dy = vocab.logit_gradient(soft, scale, weight, labels, s)
        dw.append(vocab.weight_gradient(jnp.zeros(wk.shape), dy, x))
        if number == 1:
            dx += vocab.input_gradient(dy, wk)
        else:
            a = vocab.unscaled_input_gradient(soft, wk)
            dx += vocab.partial_input_gradient(a, wk, scale, weight, labels, s)
    return jnp.sum(weight * vocab.losses(whole)), jnp.concatenate(dw)[: w.shape[0]], dx


@pytest.mark.newest
@pytest.mark.parametrize("number", [1, 2])
@given(V=st.integers(2, 40), p=st.integers(1, 9), seed=st.integers(0, 99))
def test_both_algorithms_give_the_plain_loss_and_gradients_for_any_vocabulary_on_any_shards(number, V, p, seed):
    data = problem(V, seed)
    for got, want in zip(algorithm(number, *data, p), reference(*data), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_padding_never_wins_even_where_a_shard_is_nothing_else():
    data = problem(V=3)
    for number in (1, 2):
        for got, want in zip(algorithm(number, *data, 8), reference(*data), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_statistics_survive_logits_of_any_size():
    for shift in (-1e4, 1e4):
        stats = Stats(
            *(jnp.asarray(v, jnp.float32) for v in ([[shift], [shift - 200]], [[2.0], [3.0]], [[shift], [0.0]]))
        )
        assert float(vocab.losses(vocab.combine(stats))[0]) == pytest.approx(np.log(2.0), abs=1e-3)


@given(V=st.integers(2, 40), p=st.integers(1, 9), seed=st.integers(0, 99))
def test_shards_of_the_input_layer_add_up_to_the_lookup_and_its_transpose(V, p, seed):
    w, g, ids, _ = problem(V, seed)
    parts = shards(w, p)
    np.testing.assert_array_equal(sum(vocab.lookup(wk, ids, s.first_row) for wk, s in parts), w[ids])
    rows = [vocab.scatter(jnp.zeros(wk.shape), ids, s.first_row, g) for wk, s in parts]
    np.testing.assert_allclose(jnp.concatenate(rows)[:V], jnp.zeros(w.shape).at[ids].add(g), rtol=1e-6)


def test_statistics_and_losses_are_float32_in_bfloat16_compute():
    w, x, labels, _ = problem(11)
    soft, stats = vocab.local_softmax(
        vocab.logits(w.astype(jnp.bfloat16), x.astype(jnp.bfloat16), Shard(0, 11)), labels, Shard(0, 11), jnp.bfloat16
    )
    assert soft.dtype == jnp.bfloat16 and all(s.dtype == jnp.float32 for s in stats)


@pytest.mark.parametrize(("logits", "gradients"), [(2**26, 2**28), (3 * 31, 6 * 31), (1, 1)])
def test_a_whole_table_gives_the_plain_loss_and_gradients_in_blocks_of_any_size(monkeypatch, logits, gradients):
    w, x, labels, weight = problem(31)
    monkeypatch.setattr(output_layer, "LOGITS", logits)
    monkeypatch.setattr(output_layer, "GRADIENTS", gradients)
    loss, dw, dx = vocab.unsharded(x, w, labels, weight, Shard(0, 31), jnp.ones_like(w))
    want, want_dw, want_dx = reference(w, x, labels, weight)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_allclose(dw - 1, want_dw, atol=1e-6)
    np.testing.assert_allclose(dx, want_dx, atol=1e-6)
    np.testing.assert_allclose(vocab.unsharded_loss(x, w, labels, weight, Shard(0, 31)), want, rtol=1e-6)
