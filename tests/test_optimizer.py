"""The learning rate over the steps, what decays, and what is refused."""

import jax
import jax.numpy as jnp
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vocabpp_jax.training.optimizer import adamw, warmup_cosine


@given(steps=st.integers(1, 200), data=st.data())
def test_the_rate_rises_to_its_peak_and_then_falls_to_the_last(steps, data):
    warmup = data.draw(st.integers(0, steps - 1))
    rate = warmup_cosine(1.0, steps, warmup, final_lr=0.1)
    rates = [float(x) for x in jax.vmap(rate)(jnp.arange(203))]
    rising, falling = rates[: warmup + 1], rates[warmup:]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)
    assert rates[0] > 0 and rates[warmup] == pytest.approx(1.0) and rates[steps] == pytest.approx(0.1)
    assert all(rates[k] == pytest.approx((k + 1) / warmup, rel=1e-5) for k in range(warmup))


def test_matrices_decay_unless_the_mask_names_others():
    params = {"matrix": jnp.ones((2, 2)), "norm": jnp.ones(2)}
    for options, decayed in (({}, "matrix"), ({"decay_mask": lambda tree: {"matrix": False, "norm": True}}, "norm")):
        optimizer = adamw(0.1, 10, 0, weight_decay=0.5, **options)
        updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
        after = optax.apply_updates(params, updates)
        assert all(jnp.allclose(x, 1 - 0.1 * 0.5 * (name == decayed)) for name, x in after.items())


def test_it_finds_the_minimum_of_a_parabola():
    optimizer = adamw(0.1, 200, 10, weight_decay=0)
    params = jnp.array([3.0, -2.0])
    state = optimizer.init(params)
    step = jax.jit(lambda params, state: optimizer.update(2 * params, state, params))
    for _ in range(200):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    assert jnp.abs(params).max() < 1e-2


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"peak_lr": 0}, "peak_lr is 0"),
        ({"peak_lr": float("nan")}, "peak_lr is nan"),
        ({"warmup": 10}, "warmup is 10; it must be at least 0 and less than steps, which is 10"),
        ({"warmup": -1}, "warmup is -1"),
        ({"final_lr": 2.0}, "final_lr is 2.0; it must lie between 0 and peak_lr, which is 1.0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"b2": 1.0}, "b2 is 1.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        adamw(**{"peak_lr": 1.0, "steps": 10, "warmup": 2, **arguments})
