"""The output layer's gradients in bfloat16, for tokens that the model is nearly sure of, where softmax - G is small.

The bar is what rounding softmax - G to bfloat16 once does to its products with W and X.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vocabpp_jax import Pipeline, make_mesh, schedules
from vocabpp_jax.pipeline.model_interface import Model
from vocabpp_jax.vocab import Loss

V, D, TOKENS, m, B = 256, 64, 64, 2, 2
METHODS = ("baseline", "interlaced", "vocab-1", "vocab-2", "vocab-naive")
LOSSES = {
    "plain": Loss(),
    "soft cap": Loss(soft_cap=60.0),
    "z-loss": Loss(z_loss=1e-3),
    "smoothing": Loss(label_smoothing=0.1),
    "all": Loss(soft_cap=60.0, z_loss=1e-3, label_smoothing=0.1),
}


def rounded(x):
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)


def capped(u, loss):
    return u if loss.soft_cap is None else loss.soft_cap * np.tanh(u / loss.soft_cap)


def share(y):
    e = np.exp(y - y.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@functools.cache
def problem(loss):
    """A table, hidden states and labels that bfloat16 holds exactly, with p(label) from 0.5 to 0.9999."""
    random = np.random.default_rng(0)
    w, labels = rounded(random.normal(size=(V, D)) / np.sqrt(D)), random.permutation(V)[:TOKENS]
    x = np.zeros((TOKENS, D))
    for n, wanted in enumerate(1 - np.geomspace(0.5, 1e-4, TOKENS)):
        noise, low, high = 0.5 * random.normal(size=D), 0.0, 200.0
        for _ in range(40):
            middle = (low + high) / 2
            x[n] = noise + middle * w[labels[n]]
            low, high = (middle, high) if share(capped(w @ x[n], loss))[labels[n]] < wanted else (low, middle)
    return w, rounded(x), labels


def logit_gradient(loss):
    """softmax - G, with what the extensions make of it, in float64; where it cancels, from the other rows' share."""
    w, x, labels = problem(loss)
    y = capped(x @ w.T, loss)
    p, is_label = share(y), np.arange(V) == labels[:, None]
    lse = np.log(np.exp(y - y.max(1, keepdims=True)).sum(1, keepdims=True)) + y.max(1, keepdims=True)
    others = np.where(is_label, 0, p).sum(1, keepdims=True)
    g = p + 2 * loss.z_loss * lse * p - loss.label_smoothing / V
    at_label = loss.label_smoothing * (1 - 1 / V) - others + 2 * loss.z_loss * lse * (1 - others)
    slope = 1 if loss.soft_cap is None else 1 - (y / loss.soft_cap) ** 2
    assert 0.45 < (1 - others).min() < 0.55 and 0.999 < (1 - others).max() < 0.99995
    return np.where(is_label, at_label, g) * slope / TOKENS


def gradients(method, p, loss):
    """Of the head and of its input, from a pipeline whose layers do nothing, so that the input is the embedding."""
    w, x, labels = problem(loss)

    model = Model(
        layers=p,
        vocab_size=V,
        width=D,
        block=lambda w, x, aux_inputs: x,
        init_block=lambda key, layer: jnp.zeros(1),
        init_row=lambda key, table: jnp.zeros(D),
        loss=loss,
    )
    mesh = make_mesh(p, devices=jax.devices()[:p])
    pipe = Pipeline(model, schedules.build("1f1b", method, p=p, m=m), mesh, compute_dtype="bfloat16")
    table = np.zeros((V, D), np.float32)
    table[:TOKENS] = x
    params = pipe.shard(model.init(jax.random.key(0)) | {"embed": {"tokens": table}, "head": w.astype(np.float32)})
    batch = {"tokens": np.arange(TOKENS).reshape(m, B, -1), "labels": labels.reshape(m, B, -1)}
    _, grads = jax.jit(pipe.value_and_grad)(params, batch)
    found = pipe.layout.unpack(grads)
    return found["head"], found["embed"]["tokens"][:TOKENS]


def error(got, exact):
    return np.linalg.norm(np.asarray(got, np.float64) - exact) / np.linalg.norm(exact)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize(
    ("method", "p"), [*((method, 2) for method in METHODS), ("vocab-1", 8), ("vocab-2", 4), ("vocab-naive", 3)]
)
def test_gradients_of_confident_tokens_are_as_exact_as_one_rounding_makes_them(method, p, loss):
    (w, x, _), g = problem(loss), logit_gradient(loss)
    dw, dx = gradients(method, p, loss)
    assert error(dw, g.T @ x) <= 1.5 * error(rounded(g).T @ x, g.T @ x)
    assert error(dx, g @ w) <= 1.5 * error(rounded(g) @ w, g @ w)


@pytest.mark.thorough
def test_the_size_of_the_head_does_not_matter_to_what_is_summed_over_shards():
    """float16 has little range: gradients must not leave it at either end."""
    loss = LOSSES["plain"]
    (w, x, labels), g = problem(loss), logit_gradient(loss)
    for size in (2.0**-30, 2.0**30):
        problem.cache_clear()
        scaled = functools.cache(lambda loss, size=size: (w * size, x / size, labels))
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(globals(), "problem", scaled)
            for method in ("vocab-1", "vocab-2"):
                dw, dx = gradients(method, 2, loss)
                assert error(dx, g @ w * size) <= 1.5 * error(rounded(g) @ w, g @ w)
                assert error(dw, g.T @ x / size) <= 1.5 * error(rounded(g).T @ x, g.T @ x)
