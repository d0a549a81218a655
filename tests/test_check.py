from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vocabpp_jax.schedules import (
    SCHEDULES,
    ScheduleError,
    build,
    check,
    check_program,
    evaluation,
    lower,
    methods_of,
    repeat,
)

CASES = [(s, method) for s in SCHEDULES for method in methods_of(s)]
SHARDED = [c for c in CASES if c[1] not in ("baseline", "redis")]


@st.composite
def schedules(draw, cases=CASES, largest=8):
    name, method = draw(st.sampled_from(cases))
    chunks = draw(st.integers(2, 4)) if name == "interleaved-1f1b" else None
    built = build(
        name,
        method,
        p=draw(st.integers(1, largest)),
        m=draw(st.integers(1, 20)),
        chunks=chunks,
        reordered=draw(st.booleans()),
    )
    return built


def with_passes(schedule, device, passes):
    ordered = tuple(sorted(passes, key=lambda x: x.start))
    return replace(schedule, passes=(*schedule.passes[:device], ordered, *schedule.passes[device + 1 :]))


def with_step(schedule, n, step):
    steps = schedule.vocabulary.steps
    changed = steps[:n] + ((step,) if step else ()) + steps[n + 1 :]
    return replace(schedule, vocabulary=replace(schedule.vocabulary, steps=changed))


@settings(max_examples=200)
@given(schedule=schedules(largest=12))
def test_every_schedule_of_the_family_passes(schedule):
    for one in (schedule, evaluation(schedule)):
        check(one)
        check_program(lower(one))


@pytest.mark.parametrize("schedule, method", CASES)
def test_a_large_schedule_passes(schedule, method):
    built = build(schedule, method, p=33, m=70)
    check(built)
    check_program(lower(built))


@settings(max_examples=60)
@given(schedule=schedules(), data=st.data())
def test_a_missing_or_doubled_pass_is_refused(schedule, data):
    d = data.draw(st.integers(0, schedule.p - 1))
    passes = list(schedule.passes[d])
    x = data.draw(st.sampled_from(passes))
    others = [y for y in passes if y != x]
    for changed in (others, [*passes, x._replace(start=passes[-1].last + 1)]):
        if not any(y.kind == x.kind for of in with_passes(schedule, d, changed).passes for y in of):
            continue  # without its last B, a schedule is an evaluation
        with pytest.raises(ScheduleError, match=f"device {d} .*{x.stage}{x.kind}{x.microbatch}|device .* times"):
            check(with_passes(schedule, d, changed))


@settings(max_examples=60)
@given(schedule=schedules(), data=st.data())
def test_passes_in_the_wrong_order_are_refused(schedule, data):
    d = data.draw(st.integers(0, schedule.p - 1))
    F = data.draw(st.sampled_from([x for x in schedule.passes[d] if x.kind == "F"]))
    B = next(x for x in schedule.passes[d] if x._replace(start=0, slots=1) == F._replace(kind="B", start=0))
    swapped = [x for x in schedule.passes[d] if x not in (F, B)] + [
        F._replace(start=B.start),
        B._replace(start=F.start),
    ]
    with pytest.raises(ScheduleError, match=r"device \d+"):
        check(with_passes(schedule, d, swapped))


@settings(max_examples=60)
@given(schedule=schedules(), data=st.data(), later=st.integers(0, 3))
def test_a_pass_before_its_input_or_over_another_is_refused(schedule, data, later):
    assume(schedule.stages > 1)
    stage = data.draw(st.integers(1, schedule.stages - 1))
    i = data.draw(st.integers(0, schedule.m - 1))
    d = schedule.placement[stage]
    before = next(x for of in schedule.passes for x in of if (x.kind, x.stage, x.microbatch) == ("F", stage - 1, i))
    F = next(x for x in schedule.passes[d] if (x.kind, x.stage, x.microbatch) == ("F", stage, i))
    changed = [F._replace(start=before.start - later) if x == F else x for x in schedule.passes[d]]
    with pytest.raises(ScheduleError, match=r"device \d+.*F"):
        check(with_passes(schedule, d, changed))


@settings(max_examples=60)
@given(schedule=schedules(), data=st.data())
def test_a_missing_or_doubled_step_is_refused(schedule, data):
    n = data.draw(st.integers(0, len(schedule.vocabulary.steps) - 1))
    step = schedule.vocabulary.steps[n]
    doubled = replace(schedule.vocabulary, steps=(*schedule.vocabulary.steps, step))
    for changed in (with_step(schedule, n, None), replace(schedule, vocabulary=doubled)):
        with pytest.raises(ScheduleError, match=step.name):
            check(changed)


@settings(max_examples=60)
@given(schedule=schedules(SHARDED), data=st.data())
def test_collectives_in_different_places_are_refused(schedule, data):
    assume(schedule.p > 1)
    n = data.draw(st.sampled_from([n for n, s in enumerate(schedule.vocabulary.steps) if s.op != "run"]))
    step = schedule.vocabulary.steps[n]
    d = data.draw(st.integers(1, schedule.p - 1))
    moved = replace(step, at=(*step.at[:d], step.at[d] + 1, *step.at[d + 1 :]))
    with pytest.raises(ScheduleError, match=f"{step.name} is in slot .* on device {d} .*same place"):
        check(with_step(schedule, n, moved))


@settings(max_examples=60)
@given(schedule=schedules(), data=st.data())
def test_a_step_before_its_input_or_after_its_use_is_refused(schedule, data):
    span = max(x.last for of in schedule.passes for x in of) + 50
    n = data.draw(st.integers(0, len(schedule.vocabulary.steps) - 1))
    step = schedule.vocabulary.steps[n]
    far = {"IF": span, "H": -span, "embed_sum": span, "IB": -span, "embed_grad_broadcast": -span}.get(step.name, -span)
    if (step.op, step.name) == ("start", "embed_sum") or (step.op == "start" and far > 0):
        far = span
    moved = replace(step, at=tuple(None if t is None else t + far for t in step.at))
    with pytest.raises(ScheduleError, match=r"device \d+"):
        check(with_step(schedule, n, moved))


@given(schedule=schedules())
def test_the_bound_on_activations_in_flight_is_kept(schedule):
    peaks = lower(schedule).in_flight
    check(schedule, in_flight=peaks)
    d = int(np.argmax(peaks))
    with pytest.raises(ScheduleError, match=f"device {d}: .* makes {peaks[d]} activations"):
        check(schedule, in_flight=[n - (k == d) for k, n in enumerate(peaks)])


@settings(max_examples=60)
@given(schedule=schedules(), data=st.data())
def test_a_program_with_a_wrong_cell_is_refused(schedule, data):
    program = lower(schedule)
    ring = data.draw(
        st.sampled_from(sorted(r for r, cells in program.rings.items() if cells > 1))
        if max(program.rings.values()) > 1
        else st.nothing()
    )
    names = (ring, "deliver") if ring == "inbox" else (ring,)
    places = [(i, name) for s in program.segments for i in s.body for name in names if name in i.tables]
    instruction, name = data.draw(st.sampled_from(places))
    table = instruction.tables[name]
    n, d = data.draw(st.sampled_from(np.argwhere(table >= 0).tolist()))
    right = int(table[n, d])
    table[n, d] = data.draw(st.integers(0, program.rings[ring] - 1).filter(lambda cell: cell != right))
    with pytest.raises(ScheduleError, match=f"device {d}"):
        check_program(program)


@pytest.mark.parametrize("schedule, method", CASES)
def test_a_program_that_runs_a_pass_for_another_microbatch_is_refused(schedule, method):
    program = lower(build(schedule, method, p=3, m=6))
    F = next(
        i
        for s in program.segments
        for i in s.body
        if (i.op, i.name) == ("run", "F") and (i.tables["microbatch"] == 3).any()
    )
    n, d = np.argwhere(F.tables["microbatch"] == 3)[0]
    F.tables["microbatch"][n, d] = 4
    with pytest.raises(ScheduleError, match=r"device \d"):
        check_program(program)


def test_a_block_whose_passes_collide_is_refused():
    good = build("zb-h1", "baseline", p=2, m=4)
    passes = [x._replace(start=x.start + 1) if x.kind == "W" else x for x in good.passes[0]]
    with pytest.raises(ScheduleError, match="one pass at a time"):
        check(with_passes(good, 0, passes))


def test_repeat_is_the_same_as_build_without_durations():
    from vocabpp_jax.schedules import blocks

    assert repeat(blocks.v_half(3), "vocab-2", 5, "v-half") == build("v-half", "vocab-2", p=3, m=5)
