import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from vocabpp_jax.pipeline.collectives import Native, PermuteTree, collectives
from vocabpp_jax.pipeline.mesh import make_mesh

AXES = {1: ("pipe",), 2: ("pipe", "tensor")}


def on_all(p, tensor, communicate):
    """What every device gets: ``[p, tensor, ...]``, where each has put four numbers of its own."""
    mesh = make_mesh(p, tensor=tensor, devices=jax.devices()[: p * tensor])
    own = np.arange(p * tensor * 4, dtype=np.float32).reshape(p, tensor, 4)
    spec = P(*AXES[tensor])
    run = jax.shard_map(
        lambda x: communicate(x.reshape(4)).reshape(1, *x.shape[1:-1], -1),
        mesh=mesh,
        in_specs=spec,
        out_specs=spec,
        check_vma=False,
    )
    return own, np.asarray(jax.jit(run)(own)).reshape(p, tensor, -1)


@pytest.mark.parametrize(("p", "tensor"), [(1, 1), (2, 1), (3, 1), (5, 1), (8, 1), (3, 2), (4, 2)])
def test_permutes_do_what_broadcast_sum_and_gather_do(p, tensor):
    made = PermuteTree(AXES[tensor], p)
    for device in range(p):
        own, found = on_all(p, tensor, lambda x, device=device: made.broadcast(x, device))
        np.testing.assert_array_equal(found, np.broadcast_to(own[device], found.shape))
        own, found = on_all(p, tensor, lambda x, device=device: made.total(x, device))
        np.testing.assert_array_equal(found[device], np.broadcast_to(own.sum((0, 1)), found[device].shape))
    own, found = on_all(p, tensor, lambda x: made.gather(x).reshape(-1))
    np.testing.assert_array_equal(found, np.broadcast_to(own.reshape(-1), found.shape))


@pytest.mark.parametrize(("p", "tensor"), [(3, 1), (3, 2)])
def test_permutes_and_the_backends_own_agree(p, tensor):
    made, native = PermuteTree(AXES[tensor], p), Native(AXES[tensor])
    of = [on_all(p, tensor, lambda x, who=who: who.gather(x).reshape(-1))[1] for who in (made, native)]
    np.testing.assert_array_equal(*of)
    of = [on_all(p, tensor, lambda x, who=who: who.total(x, 1))[1] for who in (made, native)]
    np.testing.assert_array_equal(of[0][1], of[1][1])


@pytest.mark.parametrize(("p", "rounds"), [(1, 0), (2, 1), (3, 2), (8, 3)])
def test_a_broadcast_and_a_sum_take_a_round_for_every_doubling(p, rounds):
    made = PermuteTree(("pipe",), p)
    for communicate in (lambda x: made.broadcast(x, 0), lambda x: made.total(x, p - 1)):
        traced = jax.make_jaxpr(communicate, axis_env=[("pipe", p)])(np.zeros(4, np.float32))
        permutes = [e.params["perm"] for e in traced.eqns if e.primitive is lax.ppermute_p]
        assert len(permutes) == rounds
        assert sum(map(len, permutes)) == p - 1  # every array moves once


@pytest.mark.parametrize(("platform", "own"), [("gpu", True), ("cuda", True), ("cpu", False)])
def test_gpus_sum_by_their_own_collective_and_cpus_by_permutes(platform, own):
    mesh = make_mesh(4, devices=jax.devices()[:4])
    total = jax.shard_map(
        lambda x: collectives(("pipe",), 4, platform).total(x, 0), mesh=mesh, in_specs=P("pipe"), out_specs=P("pipe")
    )
    text = str(jax.make_jaxpr(total)(jnp.zeros(4)))
    assert ("psum" in text, "ppermute" in text) == (own, not own)
