from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vocabpp_jax.schedules import build, lower
from vocabpp_jax.schedules.lowering.program import Instruction, Program, Segment
from vocabpp_jax.schedules.simulation.durations import Durations
from vocabpp_jax.schedules.simulation.measured import errors, read_pass_times
from vocabpp_jax.schedules.simulation.simulator import COMPILED, FREE, GPU, ON_CPUS, Rules, simulate

PUBLISHED = Path(__file__).parent.parent / "docs" / "paper"
ASYNCHRONOUS = Rules("asynchronous")


@cache
def program(schedule="1f1b", method="baseline", p=4, m=8, reordered=False):
    return lower(build(schedule, method, p=p, m=m, reordered=reordered))


# --- against formulas ------------------------------------------------------------------------------------------------


@given(p=st.integers(1, 12), m=st.integers(1, 30))
def test_1f1b_takes_m_plus_p_minus_1_times_F_plus_B(p, m):
    assert simulate(program(p=p, m=m), Durations(F=1, B=2)).makespan == 3 * (m + p - 1)


@given(p=st.integers(1, 10), m=st.integers(1, 24))
def test_1f1b_holds_p_minus_r_activations_and_vocabulary_passes_add_one_or_two(p, m):
    for method, more in (("baseline", 0), ("vocab-2", 1), ("vocab-1", 2)):
        held = simulate(program(method=method, p=p, m=m)).peak_in_flight
        assert held == tuple(min(m, p - r + more) for r in range(p))


@given(p=st.integers(2, 10), m=st.integers(1, 30))
def test_gpipe_takes_the_bubble_of_its_formula(p, m):
    assert simulate(program("gpipe", p=p, m=m), Durations(F=1, B=2)).makespan == 3 * (m + p - 1)


@pytest.mark.parametrize("p", [2, 4, 7, 8])
@pytest.mark.parametrize(("F", "B", "W"), [(1, 1, 1), (1, 1.2, 0.8), (1, 1.5, 1)])
def test_zero_bubble_schedules_wait_as_long_as_their_formulas_say(p, F, B, W):
    for name, waits in (("zb-h1", F + B - W), ("zb-h2", F + B - 2 * W)):
        timeline = simulate(program(name, p=p, m=4 * p), Durations(F=F, B=B, W=W), FREE)
        assert timeline.idle.max() == pytest.approx(max(0, (p - 1) * waits), abs=1e-9)


def test_v_half_with_vocabulary_passes_waits_no_longer_than_v_half():
    units = Durations(F=1, B=1, W=1)
    plain = simulate(program("v-half", p=8, m=32, reordered=True), units).bubble_ratio
    assert plain < simulate(program("v-half", p=8, m=32), units).bubble_ratio
    for method in ("vocab-1", "vocab-2"):
        assert simulate(program("v-half", method, p=8, m=32, reordered=True), units).bubble_ratio < plain + 0.01


@pytest.mark.parametrize("method", ["vocab-1", "vocab-2", "vocab-naive", "interlaced"])
@pytest.mark.parametrize("p", [2, 4, 7])
def test_devices_in_step_lose_nothing_where_collectives_block(method, p):
    times = Durations(F=1, B=2.3, S=0.6, T=0.4, S1=0.4, S2=0.2, grad_sum=0.1, stats=0.01, transfer=0.02)
    beside, behind = (
        simulate(lower(build("1f1b", method, p=p, m=32, overlap=overlap)), times, ON_CPUS) for overlap in (True, False)
    )
    networks = 0.1 + 0.01 + 2 * 0.02
    assert behind.steady_interval == pytest.approx(1 + 2.3 + 0.6 + 0.4 + networks, abs=0.02)
    assert beside.steady_interval > behind.steady_interval + 0.8
    assert behind.peak_in_flight == tuple(2 * (p - d) - 1 for d in range(p))


def test_an_unbalanced_head_is_what_everyone_waits_for():
    timeline = simulate(program(p=4, m=8), Durations(F=1, B=2, H=3))
    assert timeline.busy.tolist() == [24, 24, 24, 48]
    assert timeline.steady_interval == 6
    assert timeline.bubbles[0] == 1 - 24 / timeline.makespan


def test_a_stage_of_its_own_duration_sets_the_pace():
    F = [1.0, 1.0, 2.5, 1.0]
    timeline = simulate(program(p=4, m=40), Durations(F=F, B=[2 * x for x in F]))
    assert timeline.steady_interval == pytest.approx(7.5)


@pytest.mark.parametrize("name", ["v-zb", "zb-h2", "v-half", "interleaved-1f1b", "1f1b"])
def test_the_steady_interval_of_a_short_iteration_is_that_of_a_long_one(name):
    given = Durations(F=466, B=549, W=405, transfer=4)
    short, long = (
        simulate(lower(build(name, "baseline", p=8, m=m, durations=given)), given, GPU).steady_interval
        for m in (32, 120)
    )
    assert short == pytest.approx(long, rel=2e-3)


# --- the rules -------------------------------------------------------------------------------------------------------


def test_a_rendezvous_costs_both_ends_and_a_free_transfer_its_share_of_the_round_trip():
    one = program(p=4, m=40)
    assert simulate(one, Durations(transfer=0.1)).steady_interval == pytest.approx(3 + 2 * 0.1)
    # Four microbatches are in flight, and each crosses six times on its way there and back.
    assert simulate(one, Durations(transfer=0.1), FREE).steady_interval == pytest.approx(3 + 6 * 0.1 / 4)


def test_a_transfer_that_is_not_needed_yet_hides_behind_a_pass():
    one = program(method="interlaced", p=4, m=40)
    waiting = {rules: simulate(one, Durations(S=0.2, T=0.2), rules).steady_bubble for rules in (COMPILED, ASYNCHRONOUS)}
    assert waiting[ASYNCHRONOUS] < 0.01 < waiting[COMPILED]


def test_collectives_hide_behind_passes_and_use_the_network_one_at_a_time():
    timeline = simulate(
        program(method="vocab-1", p=4, m=24),
        Durations(S=0.3, T=0.6, hidden_broadcast=0.1, grad_sum=0.1, embed_sum=0.1, embed_grad_broadcast=0.1),
    )
    spans = sorted({(s.start, s.end) for s in timeline.spans() if s.op == "start" and s.end > s.start})
    assert len(spans) == 4 * 24
    assert all(a[1] <= b[0] + 1e-9 for a, b in zip(spans, spans[1:], strict=False))
    exposed = simulate(
        program(method="vocab-1", p=4, m=24), Durations(S=0.3, T=0.6, hidden_broadcast=2.0, grad_sum=2.0)
    )
    assert exposed.makespan > timeline.makespan + 24


@pytest.mark.parametrize(
    ("collectives", "rules", "lands"),
    [
        (("embed_sum",), GPU, 1 + 1),  # beside a collective that devices 0 and 2 have begun
        (("embed_sum", "stats"), GPU, 5 + 2 + 1),  # not before one that waits for another
        (("embed_sum",), replace(GPU, streams=1), 5 + 2 + 1),  # behind it
        (("embed_sum", "stats"), replace(GPU, streams=0), 1 + 1),
    ],
)
def test_a_transfer_overtakes_a_collective_that_waits_for_its_last_device(collectives, rules, lands):
    here = {"microbatch": np.zeros((1, 3), np.int32)}
    there = here | {"deliver": np.array([[-1, -1, 0]], np.int32)}
    body = (
        Instruction("run", "F", 0, 0, (), here),
        *(Instruction("start", name, 0, 0, (), here) for name in collectives),
        Instruction("permute", "F", 0, 0, ((0, 2),), here, 0),
        Instruction("land", "F", 0, 0, ((0, 2),), there, 0),
    )
    given = Program(program(p=3, m=1).schedule, (Segment(0, 1, body),), {"inbox": (0, 0, 1)})
    timeline = simulate(given, Durations(F=(1, 5, 1), embed_sum=2, stats=9, transfer=1), rules)
    assert timeline.tracks[-1].start.tolist() == [[lands, 5, lands]]


def test_no_collective_takes_time_on_one_device():
    costly = Durations(S=1, T=1, hidden_broadcast=9, stats=9, grad_sum=9, embed_sum=9, embed_grad_broadcast=9)
    assert simulate(program(method="vocab-2", p=1, m=5), costly).makespan == 5 * 5


@given(
    st.sampled_from(["baseline", "vocab-1", "vocab-2", "interlaced"]),
    st.integers(1, 6),
    st.integers(1, 12),
    st.sampled_from([COMPILED, ASYNCHRONOUS, FREE]),
    st.randoms(use_true_random=False),
)
def test_passes_of_a_device_never_overlap_and_inputs_are_there(method, p, m, rules, random):
    durations = Durations(
        F=[random.uniform(0.5, 2) for _ in range(p)],
        B=[random.uniform(1, 4) for _ in range(p)],
        S=random.random(),
        T=random.random(),
        hidden_broadcast=random.random(),
        grad_sum=random.random(),
        transfer=random.random() / 4,
    )
    timeline = simulate(program(method=method, p=p, m=m), durations, rules)
    spans = [s for s in timeline.spans() if s.op == "run"]
    for d in range(p):
        mine = sorted((s.start, s.end) for s in spans if s.device == d)
        assert all(a[1] <= b[0] + 1e-9 for a, b in zip(mine, mine[1:], strict=False))
    at = {(s.kind, s.stage, s.microbatch): s for s in spans if s.kind in "FB"}
    for (kind, stage, i), span in at.items():
        source = (kind, stage + (-1 if kind == "F" else 1), i)
        if source in at:
            assert at[source].end + durations.transfer <= span.start + 1e-9
    assert timeline.makespan == pytest.approx(max(timeline.finished))
    assert timeline.makespan >= timeline.busy.max() - 1e-9


def test_the_overhead_of_a_loop_counts_in_every_slot_and_not_as_work():
    plain, slow = (simulate(program(p=2, m=20), Durations(overhead=x)) for x in (0, 0.01))
    assert slow.makespan > plain.makespan and np.array_equal(slow.busy, plain.busy)
    free = [simulate(program(p=2, m=20), Durations(overhead=x), FREE).makespan for x in (0, 0.01)]
    assert free[0] == free[1]  # a process a device has no such loops


@pytest.mark.parametrize(
    ("wrong", "names"),
    [({"F": [1, 1]}, "F has 2"), ({"transfer": np.zeros((2, 2))}, "shape"), ({"H": [1, 2, 3]}, "H has 3")],
)
def test_durations_for_another_number_of_devices_are_refused(wrong, names):
    with pytest.raises(ValueError, match=names):
        simulate(program(p=4, m=2), replace(Durations(), **wrong))


# --- the steady state ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["vocab-1", "vocab-2"])
@pytest.mark.parametrize("p", [2, 3, 4, 5, 8, 16, 31, 64])
def test_vocabulary_passes_keep_the_steady_state_of_1f1b(method, p):
    one = program(method=method, p=p, m=3 * p + 12)
    for both in (0.1, 0.3, 0.5, 1.0, 1.5, 2.0):
        assert simulate(one, Durations(F=1, B=2, S=both / 3, T=both * 2 / 3)).steady_bubble < 0.01


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "method"), [("1f1b", "vocab-2"), ("zb-h1", "vocab-1"), ("v-half", "vocab-2"), ("gpipe", "baseline")]
)
def test_cells_alive_over_time_peak_at_what_the_program_counts(schedule, method):
    one = program(schedule, method, p=4, m=9)
    timeline = simulate(one, Durations(F=1, B=1, W=1, S=0.2, T=0.2))
    for ring, peaks in one.peaks.items():
        found = tuple(int(timeline.alive(ring, d)[1].max()) for d in range(4))
        assert all(a <= b for a, b in zip(found, peaks, strict=True)), ring
        if ring in ("residual", "kept"):
            assert found == peaks


def test_bytes_are_cells_times_their_size():
    timeline = simulate(program(method="vocab-2", p=4, m=9), Durations(S=0.2, T=0.2))
    cells = {"residual": 10.0, "X": 1.0}
    assert timeline.peak_bytes({"residual": 10.0}) == tuple(10.0 * n for n in timeline.peak_in_flight)
    assert max(timeline.peak_bytes(cells)) <= timeline.allocated_bytes(cells)
    assert timeline.bytes(cells, 0)[1][-1] == 0
    with pytest.raises(ValueError, match="residual"):
        timeline.alive("logits", 0)


# --- against measurements --------------------------------------------------------------------------------------------


def test_measured_pass_times_predict_measured_iterations():
    runs = read_pass_times((PUBLISHED / "pass_times_8xA100.csv").read_text())
    # One network for all rows; milliseconds.
    network = Durations(
        transfer=0.07, hidden_broadcast=0.08, grad_sum=0.15, embed_sum=0.15, embed_grad_broadcast=0.08, stats=0.05
    )
    mean, largest = errors(runs, [run.predict(network).makespan for run in runs])
    assert mean < 0.03 and largest < 0.05


def test_pass_times_without_an_iteration_have_no_error():
    head, row, *_ = (PUBLISHED / "pass_times_8xA100.csv").read_text().splitlines()
    (run,) = read_pass_times(f"{head}\n{row.replace('11722.8', '')}\n")
    assert run.iteration_ms is None and errors([run], [run.predict().makespan]) is None


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda t: t.replace("f_us", "g_us", 1), "no column 'f_us'"),
        (lambda t: t.splitlines()[0], "no rows"),
        (lambda t: t.replace("10572 ", "", 1), r"\[7, 8\]"),
        (lambda t: t.replace("10572", "fast", 1), "row 1"),
    ],
)
def test_pass_times_that_cannot_be_read_are_refused(change, names):
    with pytest.raises(ValueError, match=names):
        read_pass_times(change((PUBLISHED / "pass_times_8xA100.csv").read_text()))


# --- size ------------------------------------------------------------------------------------------------------------


def test_64_devices_and_512_microbatches_simulate_in_seconds():
    timeline = simulate(
        program(method="vocab-2", p=64, m=512), Durations(S=0.2, T=0.2, hidden_broadcast=0.05, grad_sum=0.05)
    )
    assert timeline.peak_in_flight[0] == 65 and timeline.steady_bubble < 0.01
