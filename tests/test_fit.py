import csv
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vocabpp_jax.schedules import (
    COMPILED,
    FREE,
    GPU,
    Durations,
    Order,
    ScheduleError,
    blocks,
    build,
    check,
    check_program,
    fit,
    lower,
    repeat,
    simulate,
)
from vocabpp_jax.schedules.candidates import unrolled
from vocabpp_jax.schedules.simulation.cost import Cost, Sizes, load_gpu
from vocabpp_jax.schedules.simulation.simulator import steady_interval
from vocabpp_jax.schedules.steady import Refined, refined, steady

PEERS = Path(__file__).parent.parent / "docs" / "paper" / "peer_schedules.csv"
BLOCKS = {
    "1f1b": blocks.one_f_one_b,
    "zb-h1": blocks.zb_h1,
    "zb-h2": blocks.zb_h2,
    "v-min": blocks.v_min,
    "v-half": blocks.v_half,
    "v-zb": blocks.v_zb,
}
SPLIT = [name for name in BLOCKS if name != "1f1b"]
A100 = load_gpu("a100-80g")
UNIT = Durations(F=1, B=1, W=1, transfer=0.01)


def of_4b(p, hidden=3072):
    return Cost(Sizes(4 * p, hidden, 2048, 32_000), A100).durations


def peers():
    """The rows of 4 stages, and of 8 those whose B takes longer than F."""
    with PEERS.open() as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if row["stages"] == "4" or (row["stages"] == "8" and row["B"] in ("549", "1098"))]


def waits(row, rules):
    """The longest wait, in percent, of the schedule fitted to a row's durations, by the same rules."""
    p, m = int(row["stages"]), int(row["microbatches"])
    given = Durations(**{name: float(row[name]) for name in ("F", "B", "W", "transfer")})
    schedule = build(row["schedule"], "baseline", p=p, m=m, durations=given, rules=rules)
    return 100 * simulate(lower(schedule), given, rules).longest_wait_ratio


@pytest.mark.sampled(2)
@pytest.mark.parametrize("row", peers(), ids=lambda row: f"{row['schedule']}-{row['stages']}-{row['B']}")
def test_a_process_a_device_waits_no_longer_than_with_the_published_generators(row):
    assert waits(row, FREE) <= float(row["wait_percent"]) + 0.2


@pytest.mark.sampled(3)
@pytest.mark.parametrize("row", peers(), ids=lambda row: f"{row['schedule']}-{row['stages']}-{row['B']}")
def test_one_program_waits_hardly_longer_than_a_process_a_device_in_the_same_order(row):
    p, m = int(row["stages"]), int(row["microbatches"])
    given = Durations(**{name: float(row[name]) for name in ("F", "B", "W", "transfer")})
    program = lower(build(row["schedule"], "baseline", p=p, m=m, durations=given))
    assert simulate(program, given, FREE).makespan >= 0.97 * simulate(program, given, GPU).makespan


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize("method", ["vocab-1", "vocab-2"])
def test_sharing_the_vocabulary_costs_one_program_hardly_more_than_its_order(name, method):
    durations = of_4b(8)
    program = lower(build(name, method, p=8, m=64, durations=durations))
    given = durations(program.schedule)
    assert simulate(program, given, FREE).makespan >= 0.97 * simulate(program, given, GPU).makespan


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("method", ["baseline", "vocab-1", "vocab-2"])
@pytest.mark.parametrize(("p", "times", "hidden"), [(2, 1, None), (4, 2, 3072), (5, 8, None), (8, 2, 6144)])
def test_what_is_fitted_is_never_slower_than_the_repeated_block_and_holds_no_more(name, method, p, times, hidden):
    durations = of_4b(p, hidden) if hidden else lambda _: UNIT
    plain = lower(repeat(BLOCKS[name](p), method, times * p, name))
    fitted = lower(fit(BLOCKS[name](p), method, times * p, durations, name))
    check(fitted.schedule)
    check_program(fitted)
    assert max(fitted.in_flight) <= max(plain.in_flight)
    took, before = (simulate(x, durations(x.schedule), GPU).makespan for x in (fitted, plain))
    assert took <= before * (1 + 1e-9)


@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize("late", [None, 0, 2])
def test_two_microbatches_per_interval_keep_every_order_and_halve_the_intervals(name, late):
    one = build(name, "vocab-2", p=4, m=11, durations=of_4b(4))
    two = unrolled(one, late)
    check(two)
    before, after = lower(one), lower(two)
    check_program(after)
    assert two.passes == one.passes and after.in_flight == before.in_flight
    intervals = [sum(segment.intervals for segment in program.segments) for program in (before, after)]
    assert intervals[1] in (-(-intervals[0] // 2), intervals[0] // 2 + 1)


def test_two_microbatches_share_an_interval_where_that_is_faster(monkeypatch):
    given = Durations(F=1, B=1.2, W=0.9, transfer=0.1)
    two = lower(build("interleaved-1f1b", "baseline", p=4, m=32, durations=given))
    monkeypatch.setattr(sys.modules["vocabpp_jax.schedules.fit"], "TWICE", 1.0)
    one = lower(build("interleaved-1f1b", "baseline", p=4, m=32, durations=given))
    assert two.schedule.interval == 2 * one.schedule.interval
    assert simulate(two, given, GPU).makespan < 0.985 * simulate(one, given, GPU).makespan


@pytest.mark.parametrize("rules", [GPU, FREE, COMPILED])
def test_the_search_comes_to_the_same_schedule_every_time(rules):
    first, second = (build("v-half", "vocab-2", p=4, m=12, durations=of_4b(4), rules=rules) for _ in range(2))
    assert first == second and hash(first) == hash(second)


@pytest.mark.parametrize("name", SPLIT)
def test_code_does_not_grow_with_microbatches(name):
    def lines(m):
        return lower(build(name, "vocab-2", p=4, m=m, durations=of_4b(4))).instructions

    assert lines(96) <= lines(48)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("p", [2, 5, 8])
def test_the_steady_state_keeps_every_device_busy_where_the_block_can(name, p):
    block = BLOCKS[name](p)
    stages = len(block.placement)
    (found,) = steady(block, {"F": np.full(stages, 1.0), "B": np.full(stages, 1.2), "W": np.full(stages, 0.8)}, 0.01)
    busy = (2.2 if name == "1f1b" else 3.0) * stages / p
    assert found.interval == pytest.approx(busy, rel=0.3 if name == "v-min" else 0.02 if name == "1f1b" else 1e-6)
    for kind, start in found.start.items():
        assert (found.end[kind] > start).all()
    assert refined(found, 4 * block.interval, 0.999).block.interval == 4 * block.interval


@pytest.mark.parametrize(("name", "bound"), [("1f1b", 1.15 * 42), ("interleaved-1f1b", 42)])
def test_of_two_collectives_and_one_pass_the_longer_is_hidden(name, bound):
    """Beyond what its slowest device computes, an interval takes as long as the shorter one; in 1F1B, where the other
    devices have time to spare."""
    others, last = (7, 1.15) if name == "1f1b" else (15, 1.0)
    F, B = ((time,) * others + (last * time,) for time in (14.0, 28.0))
    given = Durations(F=F, B=B, S=1, T=1, hidden_broadcast=5, grad_sum=12, stats=0.1)
    built = build(name, "vocab-2", p=8, m=32, durations=given)
    assert steady_interval(lower(built), given, GPU) <= (bound + 2 + 5) * (1 + 1e-9)


def test_forwards_may_have_more_time_to_spare_than_backwards():
    block, takes = blocks.zb_h2(5), {"F": np.full(5, 1.0), "B": np.full(5, 1.2), "W": np.full(5, 0.8)}
    for lean, found in zip((0.0, 0.2), steady(block, takes, 0.01, (0.0, 0.2)), strict=True):
        forward, backward = found.start["F"][1:] - found.end["F"][:-1], found.start["B"][:-1] - found.end["B"][1:]
        assert forward.min() == pytest.approx(0.01 + (1 + lean) * found.spread, rel=1e-5)
        assert backward.min() == pytest.approx(0.01 + (1 - lean) * found.spread, rel=1e-5)


@pytest.mark.parametrize(("schedule", "method"), [("v-half", "baseline"), ("v-half", "vocab-2"), ("zb-h2", "baseline")])
def test_transfers_share_permutes_where_that_costs_next_to_nothing(schedule, method):
    given = Durations(F=466, B=549, W=405, transfer=4, S=60, T=90, hidden_broadcast=8, grad_sum=16)
    built = build(schedule, method, p=8, m=32, durations=given)
    assert built.order.transfers == "before passes"
    shared, apart = lower(built), lower(built, replace(built.order, transfers="behind passes", merged=0))
    permutes = [sum(i.op == "permute" for s in program.segments for i in s.body) for program in (shared, apart)]
    assert permutes[0] < permutes[1] and shared.open_transfers <= apart.open_transfers
    assert simulate(shared, given, GPU).makespan <= 1.002 * simulate(apart, given, GPU).makespan


def test_zb_h2_waits_for_nothing_if_all_passes_take_equally_long():
    given = Durations(F=1, B=1, W=1, transfer=0.01)
    program = lower(build("zb-h2", "baseline", p=4, m=32, durations=given))
    assert simulate(program, given, GPU).longest_wait_ratio < 0.001


def test_an_interval_opens_where_devices_wait_least(monkeypatch):
    given = Durations(F=1, B=1, W=1, transfer=0.01)
    found = lower(build("v-zb", "baseline", p=10, m=30, durations=given))
    monkeypatch.setattr(Refined, "turned", lambda self, slots: self)
    usual = lower(build("v-zb", "baseline", p=10, m=30, durations=given))
    assert found.in_flight == usual.in_flight
    longest = [simulate(program, given, GPU).longest_wait_ratio for program in (found, usual)]
    assert longest[0] < 0.018 < 0.021 < longest[1]


def test_transfers_are_deferred_where_late_weight_gradients_then_wait_least(monkeypatch):
    given = Durations(F=1, B=1, W=1, transfer=0.01)
    found = lower(build("v-zb", "baseline", p=17, m=64, durations=given))
    monkeypatch.setattr(sys.modules["vocabpp_jax.schedules.fit"]._Search, "toggled", lambda self, best: best)
    usual = lower(build("v-zb", "baseline", p=17, m=64, durations=given))
    longest = [simulate(program, given, GPU).longest_wait_ratio for program in (found, usual)]
    assert longest[0] < 0.06 < 0.08 < longest[1]


def test_weight_gradients_wait_only_if_that_is_worth_their_memory(monkeypatch):
    given = Durations(F=1, B=1, W=1, transfer=0.01)
    usual, costly = [], []
    for price, found in ((None, usual), (0.01, costly)):
        if price:
            monkeypatch.setattr(sys.modules["vocabpp_jax.schedules.fit"], "CARRYING", price)
        program = lower(build("v-zb", "baseline", p=8, m=32, durations=given))
        found += [program.rings["carried"], simulate(program, given, GPU).makespan]
    assert costly[0] < usual[0] and costly[1] > usual[1]


def test_a_deferred_transfer_leaves_in_the_next_interval():
    plain = repeat(blocks.zb_h2(3), "baseline", 9)
    deferred = lower(plain, Order(transfers="behind passes", deferred=frozenset({(1, "B", 0)})))
    check_program(deferred)
    (body,) = {segment.body for segment in deferred.segments}
    assert (body[0].op, body[0].name) == ("permute", "B") and "outbox" in body[0].tables
    assert deferred.rings["outbox"] == 1


def test_a_program_whose_transfer_takes_another_cell_of_the_outbox_is_refused():
    plain = repeat(blocks.zb_h2(3), "baseline", 9)
    program = lower(plain, Order(transfers="behind passes", deferred=frozenset({(1, "B", 0)})))
    table = program.segments[0].body[0].tables["outbox"]
    table[table >= 0] += 1
    with pytest.raises(ScheduleError, match="outbox"):
        check_program(program)
