"""A state is the same arrays in every layout, and goes from one layout to another without a changed bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vocabpp_jax import Pipeline, checkpoints, make_mesh, schedules, train
from vocabpp_jax.checkpoints import canonical as canonical_module
from vocabpp_jax.pipeline.model_interface import Model
from vocabpp_jax.training.optimizer import matrices

M, B, L, V = 3, 2, 8, 29
KEY = jax.random.key(0)


def small_model(layers, tied=False, width=32):
    """One matrix a layer: what is tested here does not depend on the block, and this one compiles fast."""

    def normal(key, *shape):
        return 0.1 * jax.random.normal(key, shape)

    return Model(
        layers=layers,
        vocab_size=V,
        width=width,
        block=lambda params, x, aux_inputs: x + jnp.tanh(x @ params["w"]),
        final=lambda params, x: x * params["scale"],
        init_block=lambda key, layer: {"w": normal(key, width, width)},
        init_row=lambda key, table: normal(key, width),
        init_final=lambda key: {"scale": jnp.ones(width)},
        positions=L,
        tied=tied,
    )


def setup(schedule, method, p, layers=2, tied=False, data=1, width=32):
    mesh = make_mesh(p, data, devices=jax.devices()[: p * data])
    pipe = Pipeline(small_model(layers, tied, width), schedules.build(schedule, method, p=p, m=M), mesh)
    optimizer = optax.adamw(1e-2, mask=matrices)
    return pipe, optimizer, checkpoints.Canonical(pipe, optimizer)


def batch(seed):
    tokens = np.random.default_rng(seed).integers(0, V, (M, B, L + 1), dtype=np.int32)
    return {"tokens": tokens[..., :-1], "labels": tokens[..., 1:]}


def one_step(pipe, optimizer, state, seed):
    state, measured = train.make_step(pipe, optimizer)(state, batch(seed))
    return state, float(measured["loss"])


def save(folder, canonical, state, step=None, **options):
    state = state if step is None else state._replace(step=jnp.int32(step))
    writer = checkpoints.Writer(folder, **options)
    writer.save(canonical, state, KEY, rows=6 * int(state.step), identity={"lr": 1e-2}, config={})
    writer.close()


def load(folder, canonical, identity=None, **options):
    return checkpoints.load(folder, canonical, {"lr": 1e-2} if identity is None else identity, **options)


def flip(path, at=0.5):
    raw = bytearray(path.read_bytes())
    raw[int(len(raw) * at)] ^= 1
    path.write_bytes(raw)


@pytest.mark.thorough
@pytest.mark.newest
def test_a_round_trip_through_four_layouts_changes_no_bit_and_training_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(canonical_module, "SMALL", 64)  # split what is small too
    layouts = [("1f1b", "vocab-2", 4), ("1f1b", "baseline", 2), ("v-half", "vocab-1", 8), ("1f1b", "vocab-2", 1)]
    pipe, optimizer, canonical = setup(*layouts[0], layers=16)
    state, _ = one_step(pipe, optimizer, train.init_state(pipe, optimizer, KEY), seed=0)
    save(tmp_path / "0", canonical, state)
    first = checkpoints.read_record(tmp_path / "0", 1)["arrays"]
    expected = jax.device_get(canonical.flatten(state))
    assert max(len(x.sharding.spec) for x in canonical.flatten(state).values()) > 0
    losses = []
    for i, layout in enumerate(layouts):
        pipe, optimizer, canonical = setup(*layout, layers=16)
        loaded = load(tmp_path / str(i), canonical)
        save(tmp_path / str(i + 1), canonical, loaded.state)
        assert checkpoints.read_record(tmp_path / str(i + 1), 1)["arrays"] == first
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(canonical.flatten(loaded.state)), expected)
        if layout[0] == "1f1b":  # compiling a V-shape on eight devices takes long
            losses.append(one_step(pipe, optimizer, loaded.state, seed=1)[1])
    assert len(losses) == 3 and losses == pytest.approx([losses[0]] * 3, rel=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_canonical_arrays_have_the_models_names_and_shapes(tied):
    _, _, canonical = setup("1f1b", "baseline", 2, tied=tied)
    shapes = {name: x.shape for name, x in canonical.shapes.items()}
    assert shapes["params.embed.tokens"] == (V, 32) and shapes["params.blocks.1.w"] == (32, 32)
    assert ("params.head" in shapes) == (not tied)
    assert shapes["optimizer.0.mu.embed.tokens"] == (V, 32) and shapes["step"] == ()


def test_large_arrays_are_split_over_the_whole_mesh():
    _, _, canonical = setup("1f1b", "vocab-2", 2, data=2, width=512)
    for name, x in canonical.shapes.items():
        share = np.prod(x.sharding.shard_shape(x.shape)) / np.prod(x.shape)
        assert share == (0.25 if np.prod(x.shape) >= canonical_module.SMALL else 1), name


@settings(max_examples=20)
@given(shape=st.lists(st.integers(1, 5), max_size=3), data=st.data())
def test_a_fingerprint_tells_every_change_of_one_entry_and_every_swap(shape, data):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    (before,) = checkpoints.fingerprints({"x": jnp.asarray(x)})
    i = data.draw(st.integers(0, x.size - 1))
    changed = x.copy().reshape(-1)
    changed.view(np.uint32)[i] ^= 1 << data.draw(st.integers(0, 31))
    assert checkpoints.fingerprints({"x": jnp.asarray(changed.reshape(shape))}) != [before]
    swapped = np.roll(x.reshape(-1), 1).reshape(shape)
    assert (checkpoints.fingerprints({"x": jnp.asarray(swapped)}) == [before]) == np.array_equal(swapped, x)


def test_an_optimizer_that_no_layout_could_take_is_refused():
    pipe, _, _ = setup("1f1b", "vocab-2", 2)
    with pytest.raises(ValueError, match="neither a scalar nor part of a tree shaped like the parameters"):
        checkpoints.Canonical(pipe, optax.adafactor(1e-2, min_dim_size_to_factor=4))
