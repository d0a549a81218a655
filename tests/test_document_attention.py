"""Attention by a kernel that takes masks of scores: in blocks, of any length, for every count of documents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vocabpp_jax.models import GPTConfig, attention, document_attention
from vocabpp_jax.models.attention import attention_mask, blocked_attention
from vocabpp_jax.models.document_attention import attend_in_documents

B, H, K = 2, 4, 8


def heads(length, groups=H, dtype=jnp.float32):
    random = np.random.default_rng(length)
    q, k, v, g = (random.normal(size=(B, length, n, K)) for n in (H, groups, groups, H))
    ids = np.cumsum(random.random((B, length)) < 0.1, axis=1, dtype=np.int32)
    return *(jnp.asarray(a, dtype) for a in (q, k, v, g)), jnp.asarray(ids)


def value_and_gradients(attend, *operands):
    @jax.jit
    def both(q, k, v, g):
        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(g)

    return both(*operands)


def assert_close(got, want):
    for a, e in zip(got, want, strict=True):
        assert a.dtype == e.dtype
        np.testing.assert_allclose(a, e, atol=1e-5)


@pytest.mark.parametrize("length", [1, 7, 33, 160])
@pytest.mark.parametrize("groups", [1, H])
def test_blocks_give_what_is_written_out(monkeypatch, length, groups):
    monkeypatch.setattr(document_attention, "_QUERIES", 16)  # up to ten blocks
    q, k, v, g, ids = heads(length, groups)
    aux_inputs = {"segment_ids": ids}
    got = value_and_gradients(lambda q, k, v: attend_in_documents(q, k, v, ids, "xla"), q, k, v, g)
    want = value_and_gradients(
        lambda q, k, v: blocked_attention(q, k, v, attention_mask(length, aux_inputs), scale=K**-0.5), q, k, v, g
    )
    assert_close(got, want)


def arrays(jaxpr):
    """The shapes of all that a program makes."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from arrays(inner)


@pytest.mark.parametrize("length", [2048, 4095])
def test_no_array_grows_with_the_square_of_the_length(length):
    q, k, v, g = (jax.ShapeDtypeStruct((1, length, 1, K), jnp.bfloat16) for _ in range(4))
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def both(q, k, v, g, ids):
        return value_and_gradients(lambda q, k, v: attend_in_documents(q, k, v, ids, "xla"), q, k, v, g)

    largest = max(int(np.prod(shape)) for shape in arrays(jax.make_jaxpr(both)(q, k, v, g, ids).jaxpr))
    assert 512 * length <= largest <= 513 * length


@pytest.mark.parametrize("length", [1, 12, 13])
@pytest.mark.parametrize("documents", [False, True])
def test_attention_by_cudnn_takes_any_length_and_is_the_one_that_is_written_out(monkeypatch, length, documents):
    real, seen = jax.nn.dot_product_attention, []

    def in_its_place(q, *rest, implementation, **options):
        assert implementation == "cudnn" and (("mask" in options) == documents)
        seen.append(q.shape[1])
        return real(q, *rest, **options, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", in_its_place)
    config = GPTConfig(layers=1, hidden=H * K, heads=H, seq=16, vocab_size=8, attention="cudnn", dtype="bfloat16")
    q, k, v, g, ids = heads(length)
    aux_inputs = {"segment_ids": ids} if documents else {}
    got = value_and_gradients(lambda q, k, v: attention.attend(config, q, k, v, aux_inputs), q, k, v, g)
    want = value_and_gradients(
        lambda q, k, v: blocked_attention(q, k, v, attention_mask(length, aux_inputs), scale=K**-0.5), q, k, v, g
    )
    assert_close(got, want)
    assert seen and not any(n % 2 for n in seen)


def test_what_a_block_keeps_of_attention_in_documents_is_what_goes_into_it():
    """The backward computes it again; else what is kept would grow with the blocks."""
    q, k, v, _, ids = heads(64, dtype=jnp.bfloat16)
    _, vjp = jax.vjp(lambda q, k, v: attend_in_documents(q, k, v, ids, "xla"), q, k, v)
    kept = [a for a in jax.tree.leaves(vjp) if getattr(a, "dtype", None) == jnp.bfloat16]
    assert sum(a.size for a in kept) == 3 * q.size
