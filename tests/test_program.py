from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vocabpp_jax.schedules import (
    GPU,
    SCHEDULES,
    Durations,
    Order,
    build,
    evaluation,
    from_orders,
    lower,
    methods_of,
    simulate,
)
from vocabpp_jax.schedules.lowering.check_program import check_program
from vocabpp_jax.schedules.lowering.permutes import Permute, Transfer, permutes

CASES = [(s, method) for s in SCHEDULES for method in methods_of(s)]


def lines(program):
    """The different instructions and pairs of a program."""
    body = [i for s in program.segments for i in s.body]
    return {(i.op, i.name, i.chunk, i.slot) for i in body} | {(i.slot, pair) for i in body for pair in i.pairs}


@pytest.mark.parametrize("schedule, method", CASES)
@pytest.mark.parametrize("p", [2, 3, 8])
def test_code_does_not_grow_with_microbatches(schedule, method, p):
    short, long = (build(schedule, method, p=p, m=m) for m in (9 * p, 15 * p))
    assert lines(lower(short)) == lines(lower(long))
    reordered = lower(build(schedule, method, p=p, m=15 * p, reordered=True))
    most = long.interval * (3 * long.chunks + 6) + len(long.vocabulary.steps)
    assert all(sum(i.op != "land" for i in s.body) <= most for s in reordered.segments) and len(reordered.segments) <= 3


@pytest.mark.parametrize("method", methods_of("1f1b"))
def test_1f1b_is_one_scan(method):
    assert len(lower(build("1f1b", method, p=5, m=20)).segments) == 1


def test_the_two_phases_of_gpipe_are_scans_of_their_own():
    forward, backward = lower(build("gpipe", "baseline", p=4, m=16)).segments
    assert not {i.name for i in forward.body} & {"B"} and not {i.name for i in backward.body} & {"F"}


@pytest.mark.parametrize("far", [1, 2])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "v-zb"])
def test_ends_apart_run_only_what_they_need_and_take_less_time(schedule, far):
    def programs(m):
        built = build(schedule, "vocab-1", p=16, m=m)
        return lower(built), lower(replace(built, order=replace(built.order, ends_apart=far)))

    (together, apart), (_, longer) = programs(64), programs(128)
    check_program(apart)
    assert apart.peaks == together.peaks
    assert [s.body for s in apart.segments] == [s.body for s in longer.segments]
    smaller = [s for s in apart.segments if len(s.body) < len(together.segments[0].body)]
    assert smaller and not any(i.name == "hidden_broadcast" for s in smaller for i in s.body)
    slow = Durations(F=1, B=1, W=1, hidden_broadcast=0.2, grad_sum=0.4, embed_sum=0.4, embed_grad_broadcast=0.2)
    assert simulate(apart, slow, GPU).makespan < simulate(together, slow, GPU).makespan


def targets_of_distinct_pairs(permute):
    """The targets of a permute, after a look that no device is a source, or a target, twice."""
    sources, targets = zip(*permute.pairs, strict=True)
    assert len(set(sources)) == len(sources) and len(set(targets)) == len(targets)
    return targets


@given(case=st.sampled_from(CASES), p=st.integers(1, 9), m=st.integers(1, 20))
def test_a_permute_has_no_device_twice_and_carries_something(case, p, m):
    for program in (lower(build(*case, p=p, m=m)), lower(evaluation(build(*case, p=p, m=m)))):
        for segment in program.segments:
            landed = {i.transfer: n for n, i in enumerate(segment.body) if i.op == "land"}
            for n, i in enumerate(segment.body):
                if i.op == "permute":
                    targets = targets_of_distinct_pairs(i)
                    assert all((i.tables["microbatch"][:, t] >= 0).any() for t in targets)
                    assert landed[i.transfer] > n


@given(case=st.sampled_from(CASES), p=st.integers(1, 9), m=st.integers(1, 20))
def test_every_cell_of_a_ring_is_used(case, p, m):
    program = lower(build(*case, p=p, m=m))
    for ring, peaks in program.peaks.items():
        name = "deliver" if ring == "inbox" else ring
        tables = [i.tables[name] for s in program.segments for i in s.body if name in i.tables]
        highest = np.max([t.max(axis=0) for t in tables], axis=0)
        assert (highest + 1 == peaks).all() and program.rings[ring] == max(peaks)


@given(
    case=st.sampled_from(CASES),
    p=st.integers(1, 9),
    m=st.integers(1, 20),
    transfers=st.sampled_from(["before passes", "behind passes"]),
    merged=st.sampled_from([0, 4, 1 << 20]),
)
def test_transfers_that_leave_together_are_sound_and_take_fewer_permutes(case, p, m, transfers, merged):
    plain = build(*case, p=p, m=m)
    apart, shared = (
        lower(plain, Order(transfers=how, merged=lines)) for how, lines in (("behind passes", 0), (transfers, merged))
    )
    check_program(shared)
    assert shared.peaks == apart.peaks and permutes_of(shared) <= permutes_of(apart)
    for segment in shared.segments:
        for i in segment.body:
            if i.op == "permute":
                targets_of_distinct_pairs(i)


def permutes_of(program):
    return sum(i.op == "permute" for s in program.segments for i in s.body)


def test_a_permute_leaves_where_one_of_its_transfers_can_wait_no_longer():
    early, late, other = Transfer(0, 1, 4, 9, 1), Transfer(2, 3, 6, 8, 2), Transfer(1, 2, 9, 30, 5)
    assert permutes([early, late, other], None) == [Permute(4, 8, (early, late)), Permute(9, 30, (other,))]
    assert permutes([early, late], 0) == [Permute(4, 9, (early,)), Permute(6, 8, (late,))]
    same_source = Transfer(0, 2, 5, 9, 1)
    assert permutes([early, same_source], None) == [Permute(4, 9, (early,)), Permute(5, 9, (same_source,))]


def test_segments_follow_each_other():
    for case in CASES:
        program = lower(build(*case, p=4, m=30))
        ends = [s.first_interval + s.intervals for s in program.segments]
        assert all(b.first_interval >= end for b, end in zip(program.segments[1:], ends[:-1], strict=True))


def test_a_slot_holds_only_the_passes_that_occur_in_it():
    program = lower(build("1f1b", "vocab-2", p=3, m=9))
    for slot in range(3):
        runs = [i.name for i in program.segments[0].body if i.slot == slot and i.op == "run" and i.name in "FB"]
        assert sorted(runs) == ["B", "F"]


def test_orders_run_as_written():
    schedule = from_orders(["0F1 0F0 0B1 0B0", "1F1 1B1 1F0 1B0"], placement=(0, 1))
    assert [str(x) for x in schedule.passes[0]] == ["0F1", "0F0", "0B1", "0B0"]
    assert lower(schedule).in_flight == (2, 1)


@pytest.mark.parametrize(
    "orders, words",
    [
        (["0F0 0B0 0F1 0B1", "1F1 1F0 1B0 1B1"], "device 0 waits forever: 0B0 needs 1B0"),
        (["0F0 0X0", "1F0"], "device 0 runs '0X0'"),
        (["0F0 0B0", "0F0 1B0"], "device 1 runs 0F0; stage 0 is on device 0"),
        (["0F0 0F0 0B0", "1F0 1B0"], "device 0 runs 0F0 2 times"),
        (["0F0 0F1 0B0", "1F0 1F1 1B0"], "runs 0B1 0 times"),
    ],
)
def test_impossible_orders_are_refused(orders, words):
    with pytest.raises(ValueError) as error:
        from_orders(orders, placement=(0, 1))
    assert words in str(error.value)


def test_free_form_orders_do_not_shard_the_vocabulary():
    with pytest.raises(ValueError, match="method is 'vocab-2'"):
        from_orders(["0F0 0B0"], (0,), "vocab-2")
