"""Initial parameters: those of the model for a key, to the bit, whatever the layout, and drawn by programs that stay
the same size."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vocabpp_jax import Model, Pipeline, make_mesh, models, schedules
from vocabpp_jax.pipeline import initialization

KEY = jax.random.key(7)
LAYOUTS = {  # schedule, method, stages, tensor, data
    "one stage": ("1f1b", "vocab-2", 1, 1, 1),
    "two stages": ("1f1b", "vocab-2", 2, 1, 1),
    "three stages": ("1f1b", "vocab-2", 3, 1, 1),
    "four stages": ("zb-h1", "vocab-1", 4, 1, 2),
    "eight stages": ("1f1b", "interlaced", 8, 1, 1),
    "unsharded": ("1f1b", "baseline", 4, 1, 1),
    "unsharded, one stage": ("1f1b", "baseline", 1, 1, 1),
    "uneven": ("1f1b", "redis", 4, 1, 1),
    "V-shaped": ("v-half", "vocab-2", 2, 1, 1),
    "V-shaped, unsharded": ("v-zb", "baseline", 4, 1, 1),
    "tensor": ("1f1b", "vocab-2", 4, 2, 1),
    "tensor, unsharded": ("1f1b", "baseline", 2, 2, 1),
}
MODELS = {  # 509 rows fill no shards, 37 positions neither; widths leave a remainder in any vector
    "gpt": models.GPTConfig(layers=8, hidden=44, heads=2, seq=37, vocab_size=509),
    "gpt, tied": models.GPTConfig(layers=9, hidden=44, heads=2, seq=37, vocab_size=509, tie_embeddings=True),
    "gemma": models.named("gemma-tiny", layers=8, hidden=36, inner=44, vocab_size=509),
}


def pipeline(model: Model, schedule: str, method: str, p: int, tensor: int = 1, data: int = 1) -> Pipeline:
    mesh = make_mesh(p, data, jax.devices()[: p * tensor * data], tensor=tensor)
    return Pipeline(model, schedules.build(schedule, method, p=p, m=4), mesh)


def own_model() -> Model:
    """A model without Flax whose layers begin differently."""
    return Model(
        layers=8,
        vocab_size=101,
        width=6,
        block=lambda w, x, aux_inputs: x * w["gain"],
        init_block=lambda key, layer: {"gain": jnp.full((6,), 1.5 + layer) + jax.random.uniform(key, (6,))},
        init_row=lambda key, table: jax.random.uniform(key, (6,), minval=-1),
    )


@functools.cache
def drawn_on_one_device(name: str):
    model = models.build(MODELS[name])
    return model, jax.device_get(jax.jit(model.init)(KEY))


@pytest.mark.sampled(5)
@pytest.mark.newest
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *(("gpt", layout) for layout in LAYOUTS),
        *(("gpt, tied", layout) for layout in ("three stages", "unsharded", "V-shaped, unsharded")),
        *(("gemma", layout) for layout in ("four stages", "tensor")),
    ],
)
def test_a_key_stands_for_the_same_parameters_in_every_layout(name, layout):
    model, canonical = drawn_on_one_device(name)
    pipe = pipeline(model, *LAYOUTS[layout])
    want = pipe.layout.pack(canonical)
    got = pipe.init(KEY)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), jax.device_get(want))
    assert jax.tree.map(lambda x: x.sharding, got) == pipe.shardings


def test_a_model_without_flax_draws_each_layer_by_its_number():
    pipe = pipeline(own_model(), "v-half", "vocab-2", 2)
    gains = [block["gain"] for block in pipe.layout.unpack(pipe.init(KEY))["blocks"]]
    assert [int(g.min() - 0.5) for g in gains] == list(range(1, 9))
    jax.tree.map(np.testing.assert_array_equal, pipe.init(KEY), pipe.layout.pack(pipe.model.init(KEY)))


def test_rows_and_layers_are_independent_and_distributed_as_their_initialisers_say():
    config = models.GPTConfig(layers=4, hidden=128, heads=4, seq=64, vocab_size=1000)
    pipe = pipeline(models.build(config), "1f1b", "vocab-2", 4)
    params = jax.device_get(pipe.layout.unpack(pipe.init(KEY)))
    drawn = [params["embed"]["tokens"], params["embed"]["positions"], params["head"]]
    for block in params["blocks"]:
        drawn += [block["attention"]["qkv"]["kernel"], block["mlp"]["up"]["kernel"]]
        np.testing.assert_allclose(np.std(block["mlp"]["down"]["kernel"]), config.out_std, rtol=0.03)
        assert np.all(block["mlp"]["norm"]["scale"] == 1) and not np.any(block["mlp"]["up"]["bias"])
    for matrix in drawn:
        np.testing.assert_allclose(np.std(matrix), config.init_std, rtol=0.03)
        assert abs(np.mean(matrix)) < 3 * config.init_std / np.sqrt(matrix.size)
    samples = np.stack([matrix.ravel()[: 64 * 128] for matrix in drawn])
    correlated = np.corrcoef(samples) - np.eye(len(samples))
    assert np.max(np.abs(correlated)) < 5 / np.sqrt(64 * 128)
    rows = np.corrcoef(params["head"][:200]) - np.eye(200)
    assert np.max(np.abs(rows)) < 5.5 / np.sqrt(128)


def test_another_key_draws_another_model():
    pipe = pipeline(own_model(), "1f1b", "vocab-2", 2)
    one, other = (pipe.init(jax.random.key(seed)) for seed in (0, 1))
    assert not any(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


@pytest.mark.parametrize("schedule", ["1f1b", "v-half"])
def test_programs_grow_neither_with_layers_nor_with_stages(schedule):
    def lines(p: int, layers: int) -> tuple[int, ...]:
        model = models.build(dataclasses.replace(MODELS["gpt"], layers=layers))
        pipe = pipeline(model, schedule, "vocab-2", p)
        drawing = initialization.programs(pipe.layout, pipe.mesh)
        layers = initialization.layers_of(pipe.layout)[0][0]
        lowered = drawing.layer.lower(KEY, layers), drawing.rest.lower(KEY)
        return tuple(one.as_text().count("\n") for one in lowered)

    assert lines(2, 4) == lines(2, 16) == lines(4, 8) == lines(8, 16)


def test_a_key_whose_numbers_depend_on_the_layout_is_refused():
    pipe = pipeline(own_model(), "1f1b", "vocab-2", 2)
    with pytest.raises(ValueError, match="key has implementation rbg.*impl='threefry2x32'"):
        pipe.init(jax.random.key(0, impl="rbg"))
