import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from comparators import COMPARATORS
from vocabpp_jax import make_mesh, models
from vocabpp_jax.models.reference import reference_loss

CONFIG = models.named("gpt-tiny", layers=4, hidden=16, heads=2, seq=8, vocab_size=37)
MODEL, M = models.build(CONFIG), 4


@pytest.fixture(scope="module")
def want():
    canonical = MODEL.init(jax.random.key(0))
    tokens, labels = (jax.random.randint(jax.random.key(n), (M, 1, 8), 0, 37) for n in (1, 2))
    value = jax.jit(jax.value_and_grad(lambda params: reference_loss(MODEL, params, tokens, labels)))(canonical)
    return canonical, {"tokens": tokens, "labels": labels}, jax.device_get(value)


@pytest.mark.parametrize("name", list(COMPARATORS))
def test_every_comparator_computes_the_loss_and_gradients_of_one_device(name, want):
    canonical, batch, (loss, grads) = want
    mesh = make_mesh(2, devices=jax.devices()[:2])
    contender = COMPARATORS[name](MODEL, mesh, M, "float32")
    place = lambda spec: NamedSharding(mesh, spec)  # noqa: E731
    shardings = jax.tree.map(place, contender.specs(), is_leaf=lambda s: isinstance(s, PartitionSpec))
    params = jax.jit(contender.pack, out_shardings=shardings)(canonical)
    batch = jax.device_put(batch, place(contender.batch_spec))
    got_loss, got = jax.device_get(jax.jit(contender.value_and_grad)(params, batch))
    assert np.sum(got_loss) == pytest.approx(loss, rel=1e-6)
    errors = jax.tree.map(lambda a, b: jnp.linalg.norm(a - b) / jnp.linalg.norm(b), contender.unpack(got), grads)
    assert max(map(float, jax.tree.leaves(errors))) < 1e-5


def test_what_cannot_be_shared_out_is_refused():
    mesh = make_mesh(2, devices=jax.devices()[:2])
    for comparator in COMPARATORS.values():
        with pytest.raises(ValueError, match="microbatches is 3"):
            comparator(MODEL, mesh, 3, "float32")
    with pytest.raises(ValueError, match="layers is 4; spmd-pipeline needs a multiple of 3"):
        COMPARATORS["spmd-pipeline"](MODEL, make_mesh(3, devices=jax.devices()[:3]), 6, "float32")
