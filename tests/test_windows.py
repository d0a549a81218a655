from dataclasses import replace

import pytest
from test_pipeline import assert_parity, batch_of, pipeline

from vocabpp_jax import schedules
from vocabpp_jax.schedules import GPU, Durations, Order, blocks, check, check_program, lower, repeat, simulate
from vocabpp_jax.schedules.windows import Windows

UNIT = Durations(F=1, B=1, W=1, transfer=0.01)
BLOCKS = {"v-half": blocks.v_half, "v-zb": blocks.v_zb}
CASES = pytest.mark.parametrize(
    ("name", "p", "count"), [("v-half", 4, 8), ("v-zb", 2, 6), ("v-zb", 4, 8), ("v-zb", 4, 16), ("v-zb", 8, 36)]
)


def windowed(name, p, count, m=24, **order):
    schedule = Windows(BLOCKS[name](p), count).schedule("baseline", m, name)
    return replace(schedule, order=Order(transfers="behind passes", windows=count, **order))


@CASES
def test_a_device_runs_one_pass_at_most_in_a_window_and_the_steady_state_follows(name, p, count):
    schedule = windowed(name, p, count)
    check(schedule)
    program = lower(schedule)
    check_program(program)
    first, *others = program.segments
    assert first.intervals == count and others
    for n in range(count):
        ran = sum((i.tables["microbatch"][n] >= 0).astype(int) for i in first.body if i.op == "run" and i.name in "FBW")
        assert ran.max() == 1
    # Behind its slots, a window has one transfer in each direction; between two devices they are one.
    assert sum(i.op == "permute" for i in first.body) == min(2, p - 1)
    longer = windowed(name, p, count, m=60)
    bodies = [[s.body for s in lower(x).segments] for x in (schedule, longer)]
    assert [len(body) for body in bodies[0]] == [len(body) for body in bodies[1]]  # code does not grow


@CASES
def test_windows_hold_no_more_and_wait_less(name, p, count):
    program, usual = lower(windowed(name, p, count)), lower(repeat(BLOCKS[name](p), "baseline", 24))
    assert max(program.in_flight) <= max(usual.in_flight)
    before, after = (simulate(x, UNIT, GPU) for x in (usual, program))
    assert after.makespan < before.makespan and after.idle.max() < before.idle.max()


def test_in_windows_a_microbatch_crosses_a_device_in_the_time_of_a_pass():
    timeline = simulate(lower(windowed("v-zb", 4, 16)), UNIT, GPU)
    first = [span for span in timeline.spans() if (span.kind, span.microbatch, span.op) == ("F", 0, "run")]
    starts = [span.start for span in sorted(first, key=lambda span: span.stage)]
    assert starts == pytest.approx(range(8), abs=0.2)


@pytest.mark.parametrize(("name", "count"), [("v-half", 8), ("v-zb", 16)])
def test_gradients_with_windows_are_those_of_one_device(name, count):
    plain = windowed(name, 4, count, m=14)
    assert_parity(pipeline(plain), batch_of(14))


def test_a_program_has_more_intervals_than_windows():
    plain = schedules.build("v-zb", "baseline", p=2, m=3)
    for windows in (1000, -1):
        with pytest.raises(ValueError, match=f"windows is {windows} and intervals are"):
            lower(replace(plain, order=Order(windows=windows)))
    with pytest.raises(ValueError, match="the steady state does not follow 3 windows"):
        Windows(blocks.v_zb(4), 3).schedule("baseline", 1, "v-zb")


EQUAL, UNEQUAL = Durations(F=100, B=100, W=100, transfer=1), Durations(F=466, B=549, W=405, transfer=4)


@pytest.mark.parametrize(
    ("name", "p", "given", "published"),
    [("v-zb", 4, EQUAL, 0.04), ("v-half", 4, UNEQUAL, 1.86), ("v-zb", 8, EQUAL, 0.1), ("v-zb", 8, UNEQUAL, 1.11)],
)
def test_a_fitted_v_waits_at_most_a_point_longer_than_the_published_one(name, p, given, published):
    fitted = lower(schedules.build(name, "baseline", p=p, m=64, durations=given))
    assert 100 * simulate(fitted, given, GPU).longest_wait_ratio <= published + 1
    assert fitted.schedule.order.windows and max(fitted.in_flight) <= 2 * p
