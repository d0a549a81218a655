"""The letters at the end of a name are the array's shape: held wherever the vocabulary layers are called."""

import dataclasses
import functools
import inspect
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pipeline import V, pipeline, plain_model

from vocabpp_jax import schedules, vocab
from vocabpp_jax.vocab import Loss, Shard, input_layer, output_layer, sums, unsharded_head

LETTERED = re.compile(r"_([A-Z0-9]+)$")
MODULES = (input_layer, output_layer, sums, unsharded_head)


def public(module):
    """The functions of the vocabulary layers that a module has a public name for."""
    functions = inspect.getmembers(module, inspect.isfunction)
    return [(n, f) for n, f in functions if n[0] != "_" and f.__module__.startswith("vocabpp_jax.vocab")]


def check(name, value, sizes):
    """Holds the arrays of a value against the letters of its name, and of its fields' names; one size per letter."""
    if value is None:
        return
    if letters := LETTERED.search(name):
        for leaf in jax.tree.leaves(value):
            chex.assert_rank(leaf, len(letters[1]))
            for letter, size in zip(letters[1], leaf.shape, strict=True):
                want = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
                assert size == want, f"{name} has shape {leaf.shape}, and {letter} is {want}"
    elif hasattr(value, "_fields"):
        for field in value._fields:
            check(field, getattr(value, field), sizes)


def checking(function, called):
    @functools.wraps(function)
    def run(*arguments, **named):
        called.add(function.__name__)
        sizes = {}
        for name, value in inspect.signature(function).bind(*arguments, **named).arguments.items():
            check(name, value, sizes)
        return function(*arguments, **named)

    return run


@pytest.fixture
def called(monkeypatch):
    """The vocabulary layers' public functions, each checked when it is called; which have been."""
    names = set()
    for module in MODULES:
        for name, function in public(module):
            wrapped = checking(function, names)
            monkeypatch.setattr(module, name, wrapped)
            monkeypatch.setattr(vocab, name, wrapped)
    return names


def test_arrays_have_the_shapes_that_their_names_say(called):
    tokens = np.random.default_rng(0).integers(0, V, (3, 2, 3), dtype=np.int32)  # N 6, D 8, R 10
    batch = {"tokens": tokens, "labels": tokens}
    for loss in (Loss(), Loss(soft_cap=5.0, z_loss=1e-3, label_smoothing=0.1), Loss(label_smoothing=0.1)):
        for method in ("baseline", "vocab-1", "vocab-2", "vocab-naive"):
            built = schedules.build("1f1b", method, p=2, m=3)
            pipe = pipeline(built, dataclasses.replace(plain_model(2), loss=loss))
            jax.eval_shape(pipe.value_and_grad, pipe.layout.shapes(), batch)
            jax.eval_shape(pipe.evaluate, pipe.layout.shapes(), batch)
    assert called == {name for module in MODULES for name, _ in public(module)}


def test_another_shape_than_a_name_says_is_found(called):
    w_RD, x_ND = jnp.zeros((10, 8)), jnp.zeros((6, 8))
    vocab.logits(w_RD, x_ND, Shard(0, V))
    with pytest.raises(AssertionError, match=r"x_ND has shape \(8, 6\), and D is 8"):
        vocab.logits(w_RD, x_ND.T, Shard(0, V))
    with pytest.raises(AssertionError):
        vocab.logits(w_RD, x_ND[0], Shard(0, V))
