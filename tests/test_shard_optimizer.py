"""Copies of the model that share its parameters and the optimizer's state train as one copy does."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from test_canonical import KEY, L, V, load, save, small_model

from vocabpp_jax import Pipeline, checkpoints, compiled, make_mesh, schedules, train
from vocabpp_jax.pipeline.shares import Share, share_of
from vocabpp_jax.pipeline.weight_streaming import assemble, canonical_leaves
from vocabpp_jax.training.elementwise import refuse_mixing
from vocabpp_jax.training.optimizer import matrices

M, B = 2, 12


def pipeline(data, p=2, method="vocab-2", tied=False, width=32, layers=2, **options) -> Pipeline:
    mesh = make_mesh(p, data, devices=jax.devices()[: p * data])
    return Pipeline(small_model(layers, tied, width), schedules.build("1f1b", method, p=p, m=M), mesh, **options)


def adamw(pipe):
    # An eps like a gradient's size: with a tiny one the first steps magnify the last bits of small gradients.
    return optax.adamw(1e-2, eps=1e-2, weight_decay=0.1, mask=matrices)


def batch(seed):
    tokens = np.random.default_rng(seed).integers(0, V, (M, B, L + 1), dtype=np.int32)
    return {"tokens": tokens[..., :-1], "labels": tokens[..., 1:]}


def trained(pipe, steps=10, bad=4):
    """Canonical parameters and moments after some steps, one of which has a label that is none; also what was measured,
    and the compiled step's text."""
    optimizer = adamw(pipe)
    state, measured = train.init_state(pipe, optimizer, KEY), []
    step = train.make_step(pipe, optimizer, clip=0.1).lower(state, batch(0)).compile()
    for k in range(steps):
        data = batch(k)
        if k == bad:
            data["labels"][0, 0, 0] = 10 * V
        before, (state, metrics) = state, step(state, data)
        assert all(x.is_deleted() for x in jax.tree.leaves(before.params))
        measured.append({name: float(value) for name, value in metrics.items()})
    return jax.device_get(checkpoints.Canonical(pipe, optimizer).flatten(state)), measured, step.as_text()


@pytest.fixture(scope="module")
def one_copy():
    return trained(pipeline(1))


@pytest.mark.parametrize("data", [2, 3, 4])  # of three, no axis is a multiple
def test_ten_steps_are_those_of_one_copy_and_the_bad_one_is_skipped(one_copy, data):
    (got, measured, text), (want, expected, _) = trained(pipeline(data)), one_copy
    for a, b in zip(measured, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-5, nan_ok=True)
    assert measured[-1]["skipped"] == 1 and np.isnan(measured[4]["loss"])
    for name, array in want.items():
        np.testing.assert_allclose(got[name], array, rtol=1e-5, atol=1e-5, err_msg=name)
    summed, scattered = (
        max(compiled.hlo.shape_bytes(shape) for shape in re.findall(rf"= (.+) {kind}\(", text))
        for kind in ("all-reduce", "reduce-scatter")
    )
    assert scattered >= 4 * 32 * 32 // data and summed <= 4 * 32  # the final norm's share, which all stages sum


def test_weights_are_rounded_before_they_are_gathered():
    pipe = pipeline(4, compute_dtype="bfloat16")
    text = pipe.jit(pipe.value_and_grad).lower(pipe.layout.shapes(), batch(0)).as_text()
    gathered = re.findall(r"stablehlo.all_gather.*?: \(tensor<[\dx]*x(\w+)>\)", text)
    assert len(gathered) == len(jax.tree.leaves(pipe.layout.shapes())) and set(gathered) == {"bf16"}


@pytest.mark.parametrize("data", [2, 4])
def test_a_device_keeps_its_share_of_parameters_and_moments(data):
    one, several = (
        compiled.state_bytes(pipe, adamw(pipe)) for pipe in (pipeline(1, width=192), pipeline(data, width=192))
    )
    assert several.parameters == pytest.approx(one.parameters / data, rel=0.01)
    assert several.optimizer == pytest.approx(one.optimizer / data, rel=0.01)
    assert several.gradients == pytest.approx(one.gradients, rel=0.01) and several.rounded == several.gradients


def test_where_the_copies_do_not_share_each_keeps_all():
    pipe = pipeline(2, shard_optimizer=False)
    assert pipe.layout.specs() == pipe.layout.specs_in_use()
    assert compiled.state_bytes(pipe, adamw(pipe)) == compiled.state_bytes(pipeline(1), adamw(pipeline(1)))


@pytest.mark.parametrize(
    ("shape", "spec", "share", "at_rest"),
    [
        ((2, 12, 8), P("pipe"), Share(1, 4), P("pipe", "data")),
        ((2, 6, 8), P("pipe"), Share(2, 4), P("pipe", None, "data")),
        ((2, 30, 9), P("pipe"), Share(1, 4, 2), P("pipe", "data")),
        ((2, 8, 9), P("pipe", "tensor"), Share(1, 4), P("pipe", ("tensor", "data"))),
        ((2, 18, 40), P("pipe", "tensor"), Share(2, 4), P("pipe", "tensor", "data")),
        ((64, 6), P(("pipe", "tensor")), Share(0, 4), P(("pipe", "tensor", "data"))),
        ((2, 3), P("pipe"), Share(), P("pipe")),
        ((), P(), Share(), P()),
    ],
)
def test_a_parameter_is_cut_where_that_takes_the_least_padding(shape, spec, share, at_rest):
    found = share_of(shape, spec, {"pipe": 2, "tensor": 2}, copies=4)
    assert found == share and found.spec(spec) == at_rest
    x = jnp.arange(np.prod(shape, dtype=int)).reshape(shape)
    assert jnp.array_equal(found.cut(found.pad(x)), x)


@pytest.mark.parametrize(("data", "method"), [(3, "vocab-2"), (2, "baseline")])
def test_parameters_are_drawn_read_and_written_where_they_are_at_rest(data, method):
    pipe = pipeline(data, method=method)
    drawn, canonical = pipe.init(KEY), jax.device_get(jax.jit(pipe.model.init)(KEY))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(drawn), pipe.layout.pack(canonical))
    assert jax.tree.map(lambda x: x.sharding, drawn) == pipe.shardings

    def read(path, index):
        leaf = canonical
        for key in path:
            leaf = leaf[key]
        return leaf[index]

    jax.tree.map(np.testing.assert_array_equal, assemble(pipe, read), drawn)
    for (_, got), want in zip(canonical_leaves(pipe.layout, drawn), jax.tree.leaves(canonical), strict=True):
        np.testing.assert_array_equal(got, want)


def test_checkpoints_go_to_other_devices_and_back_to_the_bit(tmp_path):
    def of(p, data):
        pipe = pipeline(data, p, layers=4)
        return pipe, adamw(pipe), checkpoints.Canonical(pipe, adamw(pipe))

    pipe, optimizer, canonical = of(4, 2)
    state = train.init_state(pipe, optimizer, KEY)
    moments = optax.tree_utils.tree_map_params(optimizer, lambda _, w: 3 * w, state.optimizer, state.params)
    state = state._replace(optimizer=moments)
    save(tmp_path / "there", canonical, state)
    few = of(2, 1)[2]
    save(tmp_path / "back", few, load(tmp_path / "there", few).state)
    back = load(tmp_path / "back", canonical).state
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(back), jax.device_get(state))
    jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim) or pytest.fail(), back, state)


ALLOWED = {
    "adamw": optax.adamw(optax.piecewise_interpolate_schedule("linear", 1e-2, {10: 0.5, 20: 0.1})),
    "lion": optax.lion(1e-2),
    "sgd": optax.sgd(1e-2, momentum=0.9),
    "several": optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
    "finite": optax.apply_if_finite(optax.adam(1e-2), 3),
}
REFUSED = {
    "lamb": optax.lamb(1e-2),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=4),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
    "muon": optax.contrib.muon(1e-2),
}


@pytest.mark.newest
@pytest.mark.parametrize("name", ALLOWED | REFUSED)
def test_an_optimizer_that_needs_whole_parameters_is_refused(name):
    if name in ALLOWED:
        refuse_mixing(ALLOWED[name], pipeline(2).layout.shapes())
    else:
        with pytest.raises(ValueError, match="optimizer mixes the entries of a parameter .*make_step's clip"):
            train.make_step(pipeline(2), REFUSED[name])
