import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vocabpp_jax.schedules import SCHEDULES, build, check, evaluation, lower, methods_of
from vocabpp_jax.schedules.schedule import AFTER, BEFORE, LANDINGS
from vocabpp_jax.schedules.vocabulary import BARRIERS, SHARDED

CASES = [(s, method) for s in SCHEDULES for method in methods_of(s) if method in SHARDED]
SIZES = {"p": st.integers(1, 12), "m": st.integers(1, 24)}


def ends(schedule, name):
    return tuple(next(s for s in schedule.vocabulary.steps if (s.op, s.name) == (op, name)) for op in ("start", "done"))


def collectives(schedule):
    return {s.name for s in schedule.vocabulary.steps if s.op == "start"}


@pytest.mark.parametrize("schedule, method", [c for c in CASES if c[0] != "gpipe"])
def test_one_interval_is_inserted_for_each_barrier(schedule, method):
    p = 7  # no block has intervals to spare there
    assert build(schedule, method, p=p, m=9).vocabulary.inserted_intervals == BARRIERS[method]


def test_where_all_forwards_come_first_no_interval_is_needed():
    assert build("gpipe", "vocab-1", p=4, m=12).vocabulary.inserted_intervals == 0
    assert build("gpipe", "vocab-1", p=4, m=1).vocabulary.inserted_intervals > 0


@pytest.mark.parametrize("schedule, method", [c for c in CASES if c[1] != "interlaced"])
@settings(max_examples=20)
@given(**SIZES)
def test_no_interval_cuts_a_collective_and_a_slot_of_passes_hides_it(schedule, method, p, m):
    built = build(schedule, method, p=p, m=m)
    opens = ends(built, "hidden_broadcast")[0].at[0]
    for name in collectives(built):
        start, done = ends(built, name)
        assert start.place == BEFORE and done.place == LANDINGS and start.at[0] <= done.at[0]
        assert (start.at[0] - opens) // built.interval == (done.at[0] - opens) // built.interval


@pytest.mark.parametrize("schedule, method", CASES)
@settings(max_examples=20)
@given(**SIZES)
def test_without_overlap_everything_stands_behind_the_last_forward(schedule, method, p, m):
    built = build(schedule, method, p=p, m=m, overlap=False)
    check(built)
    lower(built)
    last = next(x.last for x in built.passes[built.placement[-1]] if (x.kind, x.stage) == ("F", built.stages - 1))
    for step in built.vocabulary.steps:
        assert step.place == AFTER
        assert all((t - last) % built.interval == 0 for t in step.at if t is not None)
    order = [(s.op, s.name) for s in built.vocabulary.steps]
    for name in collectives(built):
        assert order.index(("done", name)) == order.index(("start", name)) + 1


@pytest.mark.parametrize("method", ["vocab-1", "vocab-2", "vocab-naive"])
@pytest.mark.parametrize("p", range(1, 13))
def test_a_device_in_the_middle_of_a_backward_has_a_pass_to_hide_large_sums_with(method, p):
    built = build("1f1b", method, p=p, m=5)
    for name in ("hidden_broadcast", "grad_sum", "embed_sum", "embed_grad_broadcast"):
        start, done = ends(built, name)
        slots = range(start.at[0], done.at[0] + 1)
        # Algorithm 2 needs the sum right behind the last stage's F and its barrier; there T hides it.
        if (method, name) != ("vocab-2", "grad_sum"):
            assert all(
                any((x.last - t) % 3 == 0 for t in slots for x in passes[:2] + passes[-2:]) for passes in built.passes
            )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("method, T_first", [("vocab-1", True), ("vocab-2", False)])
def test_algorithm_2_sums_before_T_and_algorithm_1_after_it(schedule, method, T_first):
    for p in (1, 2, 3, 5, 8):
        steps = build(schedule, method, p=p, m=p + 2).vocabulary.steps
        place = {(s.op, s.name): (s.at[0], s.place, n) for n, s in enumerate(steps)}
        assert (place["run", "T"] < place["start", "grad_sum"]) == T_first


@pytest.mark.parametrize("schedule, method", [c for c in CASES if c[1] != "vocab-naive"])
def test_one_softmax_is_held_at_a_time(schedule, method):
    for p in (1, 2, 3, 5, 8):
        assert lower(build(schedule, method, p=p, m=2 * p + 3)).rings["P"] == 1


@pytest.mark.parametrize("p", [1, 2, 3, 5, 8])
def test_evaluation_has_no_backward_steps(p):
    forward = evaluation(build("v-half", "vocab-1", p=p, m=4))
    assert {s.name for s in forward.vocabulary.steps} == {"IF", "embed_sum", "hidden_broadcast", "S", "stats"}
    whole = evaluation(build("v-half", "baseline", p=p, m=4))
    assert {s.name for s in whole.vocabulary.steps} == {"IF", "H"}
