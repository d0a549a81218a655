"""The vocabulary layers on shards of one array, held against a plain softmax cross-entropy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vocabpp_jax import vocab
from vocabpp_jax.vocab import Coefficients, Kept, Loss, Shard, Stats, Target, unsharded_head

N, D = 7, 5
PLAIN = Loss()


def problem(V: int, seed: int = 0):
    random = np.random.default_rng(seed)
    w, x = (jnp.asarray(random.normal(size=s), jnp.float32) for s in ((V, D), (N, D)))
    return w, x, jnp.asarray(random.integers(0, V, N), jnp.int32), jnp.asarray(random.random(N), jnp.float32)


def shards(w: jax.Array, p: int) -> list[tuple[jax.Array, Shard]]:
    """The rows of a table on p devices, padded with rows that would win every softmax were they not masked."""
    rows = -(-w.shape[0] // p)
    padded = jnp.pad(w, ((0, rows * p - w.shape[0]), (0, 0)), constant_values=100.0)
    return [(padded[k * rows : (k + 1) * rows], Shard(k * rows, w.shape[0])) for k in range(p)]


def reference(w, x, labels, weight, loss=PLAIN):
    def total(w, x):
        y = x @ w.T
        y = y if loss.soft_cap is None else loss.soft_cap * jnp.tanh(y / loss.soft_cap)
        target = jax.nn.one_hot(labels, len(w)) * (1 - loss.label_smoothing) + loss.label_smoothing / len(w)
        return jnp.sum(weight * (-(target * jax.nn.log_softmax(y)).sum(1) + loss.z_loss * jax.nn.logsumexp(y, 1) ** 2))

    value, (dw, dx) = jax.value_and_grad(total, (0, 1))(w, x)
    return value, dw, dx


def algorithm(number: int, w, x, labels, weight, p, loss=PLAIN):
    """Loss, weight gradient and input gradient by Algorithm 1 or 2 over p shards."""
    parts = shards(w, p)
    local = [vocab.exponentials(vocab.logits(wk, x, s, loss), labels, s, w.dtype, loss) for wk, s in parts]
    of_shards = jax.tree.map(lambda *xs: jnp.stack(xs), *(stats for _, stats in local))
    dw, dx = [], 0
    for k, ((wk, s), (kept, _)) in enumerate(zip(parts, local, strict=True)):
        target = Target(weight, labels, s, loss)
        at = vocab.coefficients(of_shards, k, kept, target, len(wk))
        dw.append(vocab.weight_gradient(jnp.zeros(wk.shape), kept, x, at, target))
        if number == 1:
            evenly = loss.label_smoothing and loss.soft_cap is None
            uniform = vocab.uniform_input_gradient(wk, s) if evenly else None
            dx += vocab.input_gradient(kept, wk, at, target, uniform)
        else:
            a = vocab.unscaled_input_gradient(kept, wk)
            uniform = vocab.uniform_input_gradient(wk, s, kept.slopes_NR) if loss.label_smoothing else None
            dx += vocab.partial_input_gradient(a, wk, at, target, uniform)
    padding = jnp.concatenate(dw)[w.shape[0] :]
    np.testing.assert_array_equal(padding, np.zeros_like(padding))
    value = jnp.sum(weight * vocab.losses(vocab.combine(of_shards), loss))
    return value, jnp.concatenate(dw)[: w.shape[0]], dx


@pytest.mark.newest
@pytest.mark.parametrize("number", [1, 2])
@given(V=st.sampled_from([2, 7, 31, 40]), p=st.sampled_from([1, 2, 3, 9]), seed=st.integers(0, 99))
def test_both_algorithms_give_the_plain_loss_and_gradients_for_any_vocabulary_on_any_shards(number, V, p, seed):
    data = problem(V, seed)
    for got, want in zip(algorithm(number, *data, p), reference(*data), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("number", [1, 2])
@settings(max_examples=16)
@given(
    V=st.sampled_from([2, 5, 17]),
    p=st.sampled_from([1, 3, 8]),
    soft_cap=st.sampled_from([None, 1.5, 30.0]),
    z_loss=st.sampled_from([0.0, 0.01]),
    label_smoothing=st.sampled_from([0.0, 0.1]),
)
def test_soft_cap_z_loss_and_smoothing_keep_both_algorithms_exact(number, V, p, soft_cap, z_loss, label_smoothing):
    loss, data = Loss(soft_cap, z_loss, label_smoothing), problem(V)
    for got, want in zip(algorithm(number, *data, p, loss), reference(*data, loss), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(soft_cap=0.0), "soft_cap is 0.0; it must be above 0, or None"),
        (dict(z_loss=-1.0), "z_loss is -1.0; it must be 0 or above"),
        (dict(label_smoothing=1.0), "label_smoothing is 1.0; it must be at least 0 and below 1"),
    ],
)
def test_a_loss_that_makes_no_sense_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        Loss(**wrong)


def test_a_masked_label_may_be_a_row_of_the_padding():
    w, x, labels, _ = problem(V=7)
    weight, beyond = jnp.arange(N) % 2, jnp.where(jnp.arange(N) % 2, labels, 7)
    for number in (1, 2):
        got, want = (algorithm(number, w, x, at, weight, 3) for at in (beyond, labels))
        jax.tree.map(np.testing.assert_array_equal, got, want)


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
    shard = Shard(0, 11)
    y = vocab.logits(w.astype(jnp.bfloat16), x.astype(jnp.bfloat16), shard)
    kept, stats = vocab.exponentials(y, labels, shard, jnp.bfloat16)
    assert kept.p_NR.dtype == jnp.bfloat16 and all(s.dtype == jnp.float32 for s in (*stats, kept.rest_N))


@pytest.mark.parametrize("loss", [PLAIN, Loss(z_loss=0.01, label_smoothing=0.1), Loss(soft_cap=1.5)])
def test_products_add_up_in_float32_and_no_matrix_of_logits_is_made_beside_the_exponentials(loss):
    R = 11
    w, x, p = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((R, D), (N, D), (N, R)))
    row, labels = jax.ShapeDtypeStruct((N,), jnp.float32), jax.ShapeDtypeStruct((N,), jnp.int32)

    def passes(w, x, p, total, row, labels):
        target = Target(row, labels, Shard(0, R), loss)
        kept = Kept(p, row, None, row, None)
        at = Coefficients(row, row, row if loss.label_smoothing else None)
        total = vocab.weight_gradient(total, kept, x, at, target)
        return total, vocab.input_gradient(kept, w, at, target), vocab.unscaled_input_gradient(kept, w)

    total = jax.ShapeDtypeStruct((R, D), jnp.float32)
    made = [
        (e.primitive.name, v.aval) for e in jax.make_jaxpr(passes)(w, x, p, total, row, labels).eqns for v in e.outvars
    ]
    products = [aval for name, aval in made if name == "dot_general"]
    assert len(products) >= 3 and all(aval.dtype == jnp.float32 for aval in products)
    assert all(aval.shape != (N, R) for _, aval in made)


@pytest.mark.parametrize(("logits", "gradients"), [(2**26, 2**28), (3 * 31, 6 * 31), (1, 1)])
@pytest.mark.parametrize("loss", [PLAIN, Loss(1.5, 0.01, 0.1), Loss(label_smoothing=0.1)])
def test_a_whole_table_gives_the_plain_loss_and_gradients_in_blocks_of_any_size(monkeypatch, logits, gradients, loss):
    w, x, labels, weight = problem(31)
    tokens = (x, labels, weight)
    monkeypatch.setattr(unsharded_head, "LOGITS", logits)
    monkeypatch.setattr(unsharded_head, "EXPONENTIALS", gradients)
    value, dw, dx = vocab.whole_layer(tokens, w, Shard(0, 31), jnp.ones_like(w), loss)
    want, want_dw, want_dx = reference(w, x, labels, weight, loss)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(dw - 1, want_dw, atol=1e-6)
    np.testing.assert_allclose(dx, want_dx, atol=1e-6)
    np.testing.assert_allclose(vocab.whole_loss(tokens, w, Shard(0, 31), loss), want, rtol=1e-6)
