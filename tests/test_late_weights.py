from dataclasses import replace

import pytest

from vocabpp_jax.schedules import (
    COMPILED,
    GPU,
    Durations,
    Order,
    blocks,
    check,
    check_program,
    lower,
    repeat,
    simulate,
)
from vocabpp_jax.schedules.late_weights import Cooling, Late, with_shifts
from vocabpp_jax.schedules.simulation.slack import latest_ends

UNIT = Durations(F=1, B=1, W=1, transfer=0.01)
LONG_B = Durations(F=466, B=549, W=405, S=50, T=80, IF=2, transfer=20, overhead=1, hidden_broadcast=30, grad_sum=40)
SETTINGS = pytest.mark.parametrize(
    ("name", "method", "given", "rules"),
    [
        (name, method, given, rules)
        for name, method in (("v-half", "baseline"), ("v-zb", "vocab-1"), ("zb-h2", "vocab-2"))
        for given in (UNIT, LONG_B)
        for rules in (GPU, COMPILED)
    ],
)
BLOCKS = {"v-half": blocks.v_half, "v-zb": blocks.v_zb, "zb-h2": blocks.zb_h2}


def repeated(name, method, m=20):
    return replace(repeat(BLOCKS[name](4), method, m), order=Order(transfers="behind passes"))


def shifts_of(program, carried, given=UNIT, rules=GPU, last_chunk=1):
    return Cooling(program, given, rules, last_chunk).shifts(Late(carried))


def last_backward(timeline):
    return max(
        float(t.end[t.microbatch >= 0].max(initial=0)) for t in timeline.tracks if (t.op, t.kind) == ("run", "B")
    )


@SETTINGS
def test_no_pass_ends_later_than_the_latest_time_and_the_last_ends_at_it(name, method, given, rules):
    timeline = simulate(lower(repeated(name, method)), given, rules)
    latest = latest_ends(timeline, given, rules, 0)
    room = []
    for track in timeline.tracks:
        if track.op == "run":
            ran = track.microbatch >= 0
            room += (latest[track.first_interval][:, track.line] - track.end)[ran].tolist()
    assert min(room) >= -1e-6 * timeline.makespan
    assert sorted(abs(x) for x in room)[4] < 1e-6 * timeline.makespan  # a path of passes that all must not be late


@pytest.mark.parametrize("last_chunk", [0, 1])
@SETTINGS
def test_weight_gradients_that_may_delay_nothing_do_not_delay_the_last_backward(name, method, given, rules, last_chunk):
    schedule = repeated(name, method)
    cooling = Cooling(lower(schedule), given, rules, last_chunk)
    moved = with_shifts(schedule, cooling.shifts(Late(carried=1 << 20)))
    check(moved)
    check_program(lower(moved))
    assert moved.passes != schedule.passes
    without = last_backward(simulate(cooling.without, given, rules))
    assert last_backward(simulate(lower(moved), given, rules)) == pytest.approx(without, rel=1e-9)


def test_they_fill_the_waits_of_the_cool_down():
    schedule = repeated("v-zb", "baseline")
    later = with_shifts(schedule, shifts_of(lower(schedule), carried=1 << 20))
    before, after = (simulate(lower(x), UNIT, GPU) for x in (schedule, later))
    assert after.makespan < before.makespan - 1.5
    assert after.idle.max() < before.idle.max() - 1.5


def test_in_a_v_those_that_follow_the_last_forward_of_the_first_chunk_may_wait_too():
    program = lower(repeated("v-zb", "baseline"))
    more, fewer = (Cooling(program, UNIT, GPU, last_chunk).movable for last_chunk in (0, 1))
    assert fewer < more
    # The first device, of stages 0 and 7, runs its last forward of the first chunk long before that of the second.
    assert sum(stage in (0, 7) for stage, _ in more - fewer) >= 4


@pytest.mark.parametrize("carried", [2, 4])
def test_a_device_on_which_enough_of_them_wait_runs_one_at_the_next_instruction_for_it(carried):
    schedule = repeated("v-zb", "baseline")
    program = lower(schedule)
    few, many = (
        max(lower(with_shifts(schedule, shifts_of(program, limit))).peaks["carried"]) for limit in (carried, 1 << 20)
    )
    assert few <= carried + 1 < many


def test_a_longer_iteration_gains_as_much():
    shifts = shifts_of(lower(repeated("v-zb", "baseline")), carried=1 << 20)
    for m in (20, 36, 52):
        schedule = repeated("v-zb", "baseline", m)
        before, after = (simulate(lower(x), UNIT, GPU).makespan for x in (schedule, with_shifts(schedule, shifts)))
        assert after < before - 1.5
