"""Parameters and FLOPs of named sizes are those of their matrices."""

import jax
import pytest

from vocabpp_jax.models import (
    SIZES,
    GPTConfig,
    build,
    embedding_flops,
    head_flops,
    layer_flops,
    layer_parameters,
    model_flops,
    named,
    parameters,
    vocabulary_parameters,
)

CONFIG = GPTConfig(layers=2, hidden=32, heads=4, seq=12, vocab_size=50)
B, L, D = 2, CONFIG.seq, CONFIG.hidden


@pytest.mark.parametrize(
    ("name", "layers", "heads", "hidden"),
    [
        ("4B", 32, 24, 3072),
        ("10B", 48, 32, 4096),
        ("21B", 64, 40, 5120),
        ("7B", 32, 32, 4096),
        ("16B", 48, 40, 5120),
        ("30B", 64, 48, 6144),
    ],
)
def test_published_sizes_are_the_published_ones(name, layers, heads, hidden):
    config = named(name, vocab_size=256_000, seq=4096)
    assert (config.layers, config.heads, config.hidden) == (layers, heads, hidden)
    assert (config.seq, config.vocab_size, config.tie_embeddings) == (4096, 256_000, False)
    b, s, h, V = 1, config.seq, config.hidden, config.vocab_size
    assert layer_flops(config) == b * s * h * (72 * h + 12 * s)
    assert head_flops(config) == 6 * b * s * h * V
    assert model_flops(config) == layers * layer_flops(config) + head_flops(config)
    assert layer_parameters(config) == pytest.approx(12 * h * h, rel=2e-3)
    assert vocabulary_parameters(config) == h * V


def test_an_unknown_size_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'5B'.*gpt-tiny, .*30B"):
        named("5B")


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted_exactly(name, tied):
    config = named(name, tie_embeddings=tied, layers=2)
    shapes = build(config).param_shapes()
    count = lambda tree: sum(a.size for a in jax.tree.leaves(tree))  # noqa: E731
    assert parameters(config) == count(shapes)
    assert layer_parameters(config) == count(shapes["blocks"][0])
    assert vocabulary_parameters(config) == shapes["embed"]["tokens"].size


def test_flops_grow_with_the_batch():
    for flops in (layer_flops, head_flops, embedding_flops, model_flops):
        assert flops(CONFIG, batch=3) == 3 * flops(CONFIG)
