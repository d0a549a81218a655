"""What somebody who brings their own mesh, loader and keys meets first."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from vocabpp_jax import Pipeline, make_mesh, models, schedules
from vocabpp_jax.pipeline.microbatches import in_microbatches

CONFIG = models.named("gpt-tiny", vocab_size=61, layers=2, hidden=8, heads=2, seq=6)
M = 3


def batch(data: int = 1) -> dict[str, np.ndarray]:
    text = np.random.default_rng(0).integers(0, 61, (M, 2 * data, 7))
    return {"tokens": text[..., :-1], "labels": text[..., 1:]}


def pipeline(mesh: jax.sharding.Mesh) -> Pipeline:
    return Pipeline(models.build(CONFIG), schedules.build("1f1b", "vocab-2", p=2, m=M), mesh)


def loss_of(pipe: Pipeline, given: dict) -> float:
    return float(pipe.jit(pipe.evaluate)(pipe.init(jax.random.key(0)), given))


def reference(given: dict) -> float:
    model = models.build(CONFIG)
    return float(models.reference_loss(model, model.init(jax.random.key(0)), **given))


def test_a_mesh_takes_every_device_or_says_so():
    assert make_mesh(pipe=4).shape == {"data": 2, "pipe": 4} and make_mesh(2, tensor=2).shape["data"] == 2
    assert make_mesh(pipe=4, devices=jax.devices()[:4]).shape == {"data": 1, "pipe": 4}
    with pytest.raises(ValueError, match="pipe is 4, data 1, and there are 8 devices; .* devices=jax.devices"):
        make_mesh(pipe=4, data=1)


@pytest.mark.parametrize(("axes", "kind"), [(("data", "pipe"), None), (("pipe", "data"), AxisType.Explicit)])
def test_jax_s_own_meshes_do_whatever_their_axis_types(axes, kind):
    types = {} if kind is None else {"axis_types": (kind, kind)}
    mesh = jax.make_mesh((2, 2), axes, devices=jax.devices()[:4], **types)
    assert loss_of(pipeline(mesh), batch(2)) == pytest.approx(reference(batch(2)), rel=1e-5)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("data", [1, 2])
def test_a_batch_without_microbatches_is_split_into_them(data):
    pipe = pipeline(make_mesh(2, data, jax.devices()[: 2 * data]))
    whole = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), batch(data))
    assert loss_of(pipe, whole) == pytest.approx(reference(batch(data)), rel=1e-5)
    assert loss_of(pipe, pipe.global_batch(whole)) == pytest.approx(reference(batch(data)), rel=1e-5)
    with pytest.raises(ValueError, match=rf"tokens has shape \[5, 6\]; it must be .* or \[a multiple of {M * data}"):
        pipe.evaluate(pipe.layout.shapes(), jax.tree.map(lambda x: x[:5], whole))


def test_the_rows_of_one_part_of_the_data_axis_stay_there():
    pipe = pipeline(make_mesh(2, 2, jax.devices()[:4]))
    rows = pipe.global_batch({"tokens": np.arange(12)[:, None]})["tokens"]
    halves = {tuple(np.asarray(shard.data).ravel()) for shard in rows.addressable_shards}
    assert halves == {tuple(range(6)), tuple(range(6, 12))}
    split = np.asarray(in_microbatches(rows, M, 2))[..., 0]
    assert set(split[:, :2].ravel()) == set(range(6)) and split.shape == (M, 4)


def test_keys_of_both_kinds_draw_the_same_model():
    pipe = pipeline(make_mesh(2, devices=jax.devices()[:2]))
    jax.tree.map(np.testing.assert_array_equal, pipe.init(jax.random.key(7)), pipe.init(jax.random.PRNGKey(7)))
