"""Where parameters live: nothing lost on the way there and back, nothing counted twice."""

import jax
import numpy as np
import pytest

from vocabpp_jax import Layout, models, schedules
from vocabpp_jax.training.optimizer import matrices


def layout(schedule="1f1b", method="vocab-2", p=4, layers=8, tied=False, counts=None) -> Layout:
    config = models.GPTConfig(layers=layers, hidden=8, heads=2, seq=4, vocab_size=13, tie_embeddings=tied)
    return Layout(models.build(config), schedules.build(schedule, method, p=p, m=3, layer_counts=counts))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("p", [1, 3])
@pytest.mark.parametrize(
    ("schedule", "method"),
    [
        ("1f1b", "baseline"),
        ("1f1b", "vocab-2"),
        ("v-half", "baseline"),
        ("v-half", "vocab-1"),
        ("interleaved-1f1b", "vocab-2"),
    ],
)
def test_packing_and_unpacking_give_back_the_same_bits(schedule, method, p, tied):
    there = layout(schedule, method, p, layers=9, tied=tied)
    canonical = there.model.init(jax.random.key(0))
    back = there.unpack(there.pack(canonical))
    assert jax.tree.structure(back) == jax.tree.structure(canonical)
    jax.tree.map(np.testing.assert_array_equal, back, canonical)


@pytest.mark.parametrize("method", ["baseline", "vocab-2"])
@pytest.mark.parametrize("tied", [False, True])
def test_weighted_by_unique_every_parameter_counts_once(method, tied):
    there = layout(method=method, tied=tied)
    canonical = there.model.init(jax.random.key(0))
    squares = jax.tree.map(lambda w, u: float((u * np.square(w)).sum()), there.pack(canonical), there.unique())
    want = sum(float(np.square(w).sum()) for w in jax.tree.leaves(canonical))
    assert sum(jax.tree.leaves(squares)) == pytest.approx(want, rel=1e-5)


def test_a_v_shaped_device_holds_the_d_th_stage_from_both_ends():
    assert layout("v-half", layers=8).layer_of == (((0, 1, 2, 3),), ((7, 6, 5, 4),))


def test_uneven_stages_leave_holes_only_where_layers_lack():
    there = layout(layers=6, counts=(2, 2, 2, 0))
    assert there.layer_of == (((0, 2, 4, None), (1, 3, 5, None)),)


def test_layers_that_do_not_divide_go_to_later_stages():
    assert layout(layers=10).layer_counts == (2, 2, 3, 3)


def test_fewer_layers_than_stages_are_refused_with_a_number_that_would_do():
    with pytest.raises(ValueError, match="layers is 3; 4 stages need at least one each"):
        layout(layers=3)


def test_layer_counts_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match=r"add up to 7; the model has 8"):
        layout(layers=8, counts=(1, 2, 2, 2))


def test_matrices_are_told_from_vectors_behind_the_device_axis():
    there = layout()
    for params, layer in (
        (there.shapes(), lambda x: x["blocks"][0][0]),
        (there.model.param_shapes(), lambda x: x["blocks"][0]),
    ):
        found = matrices(params)
        qkv = layer(found)["attention"]["qkv"]
        assert qkv["kernel"] and not qkv["bias"]
        assert found["head"] and not any(jax.tree.leaves(found["final"]))
