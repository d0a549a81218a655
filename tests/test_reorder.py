import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vocabpp_jax.schedules import SCHEDULES, Block, build, lower, reorder
from vocabpp_jax.schedules.simulation.durations import Durations
from vocabpp_jax.schedules.simulation.simulator import simulate

UNIT = Durations(F=1, B=1, W=1)
SPLIT = ("zb-h1", "zb-h2", "v-min", "v-half", "v-zb")
METHODS = ("baseline", "vocab-2", "vocab-1")


def both(schedule, method, p, m):
    return tuple(lower(build(schedule, method, p=p, m=m, reordered=flag)) for flag in (True, False))


@pytest.mark.thorough
@settings(max_examples=80)
@given(schedule=st.sampled_from(SPLIT), method=st.sampled_from(METHODS), p=st.integers(1, 10), m=st.integers(1, 40))
def test_reordering_never_holds_more_activations_nor_takes_longer(schedule, method, p, m):
    reordered, plain = both(schedule, method, p, m)
    for ring in ("residual", "kept", "carried", "P"):
        assert reordered.rings.get(ring, 0) <= plain.rings.get(ring, 0)
    assert reordered.rings["inbox"] <= plain.rings["inbox"] + 3
    assert simulate(reordered, UNIT).makespan <= simulate(plain, UNIT).makespan


@pytest.mark.parametrize("method", METHODS)
def test_v_half_with_vocabulary_passes_is_within_a_point_of_the_published_reordered_one(method):
    timeline = simulate(lower(build("v-half", method, p=8, m=32, reordered=True)), UNIT)
    assert timeline.bubble_ratio <= 0.082 + 0.01


@pytest.mark.parametrize("p", [2, 3, 4, 5, 8, 12])
def test_zero_bubble_schedules_only_wait_for_the_pipeline_to_fill(p):
    m = 4 * p
    assert simulate(lower(build("zb-h1", "baseline", p=p, m=m, reordered=True)), UNIT).makespan == 3 * m + p - 1
    assert simulate(lower(build("zb-h2", "baseline", p=p, m=m, reordered=True)), UNIT).makespan == 3 * m + p - 1
    for method in ("vocab-2", "vocab-1"):
        assert simulate(lower(build("zb-h1", method, p=p, m=m, reordered=True)), UNIT).makespan <= 3 * m + p + 3


@pytest.mark.parametrize("name", [s for s in SCHEDULES if s not in SPLIT])
def test_schedules_without_W_stay_as_they_are(name):
    assert build(name, "vocab-2", p=4, m=6, reordered=True) == build(name, "vocab-2", p=4, m=6)


def test_a_block_of_longer_passes_is_refused():
    with pytest.raises(ValueError, match="in one slot each"):
        reorder(Block(3, (0, 1), F=(0, 1), B=(4, 2), backward_slots=2), "baseline", 4)


@pytest.mark.parametrize("name", ["zb-h1", "zb-h2", "v-half", "v-zb", "v-min"])
def test_algorithm_1_needs_no_second_interval_where_B_and_W_are_apart(name):
    published, fewer = (lower(build(name, "vocab-1", p=4, m=16, inserted=n, reordered=True)) for n in (None, 1))
    other = lower(build(name, "vocab-2", p=4, m=16, reordered=True))
    assert max(fewer.in_flight) <= max(other.in_flight) < max(published.in_flight)
    assert simulate(fewer, UNIT).makespan <= simulate(other, UNIT).makespan


def test_v_half_can_shard_the_vocabulary_at_its_own_memory():
    plain = lower(build("v-half", "baseline", p=8, m=32, reordered=True))
    without = lower(build("v-half", "vocab-2", p=8, m=32, inserted=0, reordered=True))
    assert max(without.in_flight) <= max(plain.in_flight)
    assert simulate(without, UNIT).bubble_ratio <= simulate(plain, UNIT).bubble_ratio + 0.04


@pytest.mark.parametrize("options, words", [
    (dict(schedule="1f1b", method="vocab-1", inserted=1), "inserted is 1; vocab-1 on this block needs 2"),
    (dict(schedule="zb-h1", method="baseline", inserted=0), "inserted is 0 with method 'baseline'"),
    (dict(schedule="zb-h1", method="vocab-2", inserted=-1), "inserted is -1"),
    (dict(schedule="zb-h1", method="vocab-2", inserted=1, overlap=False), "inserted is 1 without overlap"),
])  # fmt: skip
def test_intervals_that_make_no_sense_are_refused(options, words):
    with pytest.raises(ValueError) as error:
        build(**options, p=4, m=8)
    assert words in str(error.value)
