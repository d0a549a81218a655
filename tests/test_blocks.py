from collections import Counter

import pytest

from vocabpp_jax.schedules import SCHEDULES, Block, blocks, build, evaluation, lower, methods_of, repeat

BLOCKS = {
    "1f1b": blocks.one_f_one_b,
    "interlaced": blocks.interlaced,
    "zb-h1": blocks.zb_h1,
    "zb-h2": blocks.zb_h2,
    "v-min": blocks.v_min,
    "v-half": blocks.v_half,
    "v-zb": blocks.v_zb,
    "gpipe": lambda p: blocks.gpipe(p, 7),
    "interleaved": lambda p: blocks.interleaved_one_f_one_b(p, 3),
}
REPEATING = [name for name in BLOCKS if name not in ("gpipe", "interleaved")]


def in_flight(schedule, method, p, m, **options):
    return lower(build(schedule, method, p=p, m=m, **options)).in_flight


@pytest.mark.parametrize("name", REPEATING)
@pytest.mark.parametrize("p", range(1, 33))
def test_no_two_passes_of_a_device_fall_into_one_slot(name, p):
    block = BLOCKS[name](p)
    for d in range(p):
        taken = Counter((x.start + k) % block.interval for x in block.passes(d, 0) for k in range(x.slots))
        assert max(taken.values()) == 1


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("p", range(1, 33))
def test_every_pass_of_a_block_comes_after_its_input(name, p):
    block = BLOCKS[name](p)
    F, B, W, slots = block.F, block.B, block.W, block.backward_slots
    assert all(a < b for a, b in zip(F[:-1], F[1:], strict=True))
    assert F[-1] < B[-1]
    assert all(a >= b + slots for a, b in zip(B[:-1], B[1:], strict=True))
    assert all(b < w for b, w in zip(B, W, strict=True)) if W else True


@pytest.mark.parametrize("p", range(1, 13))
def test_activations_in_flight_are_as_published(p):
    m = 3 * p + 5
    assert in_flight("1f1b", "baseline", p, m) == tuple(p - r for r in range(p))
    assert in_flight("1f1b", "vocab-2", p, m) == tuple(p - r + 1 for r in range(p))
    assert in_flight("1f1b", "vocab-1", p, m) == tuple(p - r + 2 for r in range(p))
    assert in_flight("1f1b", "interlaced", p, m)[0] == 3 * p // 2
    assert in_flight("gpipe", "baseline", p, m) == (m,) * p
    assert in_flight("zb-h1", "baseline", p, m) == (p,) * p
    assert in_flight("zb-h2", "baseline", p, m) == (2 * p - 1,) * p


@pytest.mark.parametrize("p", range(2, 13))
def test_half_stages_in_flight_are_as_published(p):
    m = 3 * p + 5
    half = p + 2 if p % 2 == 0 else p + 1
    assert max(in_flight("v-half", "baseline", p, m)) == half
    assert max(in_flight("v-half", "vocab-2", p, m)) == half + 2
    assert max(in_flight("v-half", "vocab-1", p, m)) == half + 4
    assert max(in_flight("v-zb", "baseline", p, m)) == 2 * p
    assert 2 * p / 3 <= max(in_flight("v-min", "baseline", p, m)) <= 2 * p / 3 + 3


@pytest.mark.parametrize("chunks", [2, 3, 4])
@pytest.mark.parametrize("p", [1, 2, 3, 4, 5, 8])
def test_stages_in_flight_of_the_interleaved_schedule_are_as_published(p, chunks):
    held = in_flight("interleaved-1f1b", "baseline", p, 4 * p, chunks=chunks)
    assert held == tuple((chunks - 1) * p + 2 * (p - 1 - d) + 1 for d in range(p))


@pytest.mark.parametrize("name", SCHEDULES)
def test_evaluation_keeps_nothing_and_stays_on_the_same_stages(name):
    for method in methods_of(name):
        schedule = build(name, method, p=4, m=6)
        forward = evaluation(schedule)
        assert forward.placement == schedule.placement and forward.sharded == schedule.sharded
        assert forward.interval == schedule.chunks
        assert not forward.trains and set(lower(forward).rings) <= {"inbox", "X", "P"}


def test_a_schedule_of_ones_own_is_a_block_and_takes_every_method():
    block = Block(interval=4, placement=(0, 1), F=(0, 1), B=(4, 2), W=(6, 4))
    for method in ("baseline", "vocab-1", "vocab-2"):
        schedule = repeat(block, method, 5, name="mine")
        assert schedule.name == "mine" and lower(schedule).in_flight == lower(repeat(block, method, 9)).in_flight


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(schedule="2f2b"), "schedule is '2f2b'"),
        (dict(method="vocab-3"), "method is 'vocab-3'"),
        (dict(schedule="v-half", method="interlaced"), "that one runs on 1f1b"),
        (dict(schedule="zb-h1", method="vocab-naive"), "that one runs on 1f1b"),
        (dict(schedule="gpipe", method="redis"), "that one runs on 1f1b"),
        (dict(p=0), "p is 0"),
        (dict(m=0), "m is 0"),
        (dict(chunks=2), "chunks is 2; 1f1b has 1"),
        (dict(schedule="interleaved-1f1b", chunks=1), "chunks is 1"),
        (dict(method="redis", layer_counts=(3, 3, 2)), "layer_counts has 3 entries"),
        (dict(method="redis", layer_counts=(3, 3, 2, -1)), "layer_counts is (3, 3, 2, -1)"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(wrong, words):
    with pytest.raises(ValueError) as error:
        build(**(dict(p=4, m=4) | wrong))
    assert words in str(error.value)


@pytest.mark.parametrize(
    "wrong",
    [dict(interval=0), dict(F=(0,)), dict(B=(4, 2, 3)), dict(B=(), W=(6, 4)), dict(group=0), dict(group_interval=7)],
)
def test_a_malformed_block_is_refused(wrong):
    with pytest.raises(ValueError):
        Block(**(dict(interval=4, placement=(0, 1), F=(0, 1), B=(4, 2), W=(6, 4)) | wrong))
