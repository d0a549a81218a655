import pytest
from hypothesis import given
from hypothesis import strategies as st

from vocabpp_jax.schedules import even_split, head_in_layers, optimal_split, published_split

SPLITS = {"layers": st.integers(0, 96), "stages": st.integers(1, 32), "rho": st.floats(0, 40)}


@pytest.mark.parametrize("vocab_size, last", [(32_000, 4), (64_000, 3), (128_000, 2), (256_000, 0)])
def test_the_published_split_leaves_the_last_of_8_stages_the_published_layers(vocab_size, last):
    rho = head_in_layers(hidden=3072, seq_length=2048, vocab_size=vocab_size)
    assert published_split(32, 8, rho)[-1] == last


@given(**SPLITS)
def test_splits_have_all_layers_and_extras_on_late_stages(layers, stages, rho):
    for split in (even_split(layers, stages), published_split(layers, stages, rho), optimal_split(layers, stages, rho)):
        assert len(split) == stages and sum(split) == layers and min(split) >= 0
        assert list(split[:-1]) == sorted(split[:-1])


@given(**SPLITS)
def test_no_split_has_a_faster_slowest_stage_than_the_optimal_one(layers, stages, rho):
    def slowest(split):
        return max([*split[:-1], split[-1] + rho])

    others = [even_split(layers, stages), published_split(layers, stages, rho)]
    assert all(slowest(optimal_split(layers, stages, rho)) <= slowest(split) for split in others)


def test_a_split_over_no_stages_is_refused():
    with pytest.raises(ValueError, match="stages 0"):
        even_split(4, 0)
