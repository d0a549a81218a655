import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vocabpp_jax.schedules import SCHEDULES, build, evaluation, lower, methods_of
from vocabpp_jax.schedules.simulation import formats
from vocabpp_jax.schedules.simulation.formats import Action
from vocabpp_jax.schedules.simulation.simulator import Durations, simulate

CASES = [(schedule, method) for schedule in SCHEDULES for method in methods_of(schedule)]


@given(st.sampled_from(CASES), st.integers(1, 5), st.integers(1, 9))
def test_a_schedule_comes_back_from_json(case, p, m):
    for schedule in (build(*case, p=p, m=m), evaluation(build(*case, p=p, m=m))):
        assert formats.from_json(formats.to_json(schedule)) == schedule


def test_a_redistributed_schedule_keeps_its_layers_in_json():
    schedule = build("1f1b", "redis", p=3, m=2, layer_counts=(2, 2, 0))
    assert formats.from_json(formats.to_json(schedule)).layer_counts == (2, 2, 0)


@given(st.sampled_from(CASES), st.integers(1, 5), st.integers(1, 14), st.booleans())
def test_the_csv_comes_back_as_the_same_actions(case, p, m, vocabulary):
    schedule = build(*case, p=p, m=m)
    rows = formats.from_csv(formats.to_csv(schedule, vocabulary))
    assert rows == formats.actions_of(schedule, vocabulary)
    assert len(rows) == p


def test_1f1b_without_vocabulary_is_torchs_1f1b():
    text = formats.to_csv(build("1f1b", "vocab-2", p=2, m=3), vocabulary=False)
    # The first stage runs one forward more than torch's: that is what vocab-2 holds more.
    assert text.splitlines() == ["0F0,0F1,0F2,0B0,0B1,0B2", "1F0,1F1,1B0,1F2,1B1,1B2"]
    text = formats.to_csv(build("1f1b", "baseline", p=2, m=3), vocabulary=False)
    assert text.splitlines() == ["0F0,0F1,0B0,0F2,0B1,0B2", "1F0,1B0,1F1,1B1,1F2,1B2"]


def test_a_split_backward_is_I_and_W():
    rows = formats.actions_of(build("zb-h1", "baseline", p=2, m=2), vocabulary=False)
    assert {a.name for row in rows for a in row} == {"F", "I", "W"}


def test_vocabulary_passes_are_written_with_the_device_in_the_stages_place():
    cells = formats.to_csv(build("v-half", "vocab-1", p=2, m=1)).replace("\n", ",").split(",")
    assert {"0IF0", "1IF0", "0S0", "1S0", "0T0", "1T0", "0IB0", "1IB0", "0G0"} <= set(cells)
    naive = formats.to_csv(build("1f1b", "vocab-naive", p=1, m=12))
    assert "0SM10" in naive and "0SE1," in naive
    assert Action(0, "S1", 0) in formats.from_csv(naive)[0]


def test_empty_cells_are_a_wait_and_anything_else_is_refused():
    assert formats.from_csv("0F0,,0B0\n") == ((Action(0, "F", 0), Action(0, "B", 0)),)
    with pytest.raises(ValueError, match="rank 1, column 2 is 'F0'"):
        formats.from_csv("0F0\n1F0,1B0,F0\n")


@pytest.mark.parametrize("text", ["{}", "[1]", '{"format": "vocabpp_jax schedule", "version": 99}'])
def test_json_of_something_else_is_refused(text):
    with pytest.raises(ValueError, match="not a schedule of version 1"):
        formats.from_json(text)


def test_json_with_a_field_missing_is_refused():
    data = json.loads(formats.to_json(build("1f1b", "baseline", p=2, m=1)))
    del data["placement"]
    with pytest.raises(ValueError, match="placement"):
        formats.from_json(json.dumps(data))


def test_a_trace_has_every_pass_and_collective_on_its_device():
    timeline = simulate(lower(build("1f1b", "vocab-2", p=3, m=4)), Durations(S=0.2, T=0.2, C0=0.1, transfer=0.05))
    trace = json.loads(formats.to_trace(timeline, microseconds=1e3))["traceEvents"]
    slices = [e for e in trace if e["ph"] == "X"]
    assert sum(e["cat"] in "FBST" for e in slices) == 4 * 3 * 4
    assert sum(e["cat"] == "C0" for e in slices) == 3 * 4
    assert sum(e["cat"] == "receive" for e in slices) == 2 * 2 * 4
    assert max(e["ts"] + e["dur"] for e in slices if e["cat"] == "B") == pytest.approx(
        1e3 * max(s.end for s in timeline.spans() if s.kind == "B")
    )
    held = [e["args"]["held"] for e in trace if e["ph"] == "C" and e["pid"] == 0]
    assert max(held) == 4 and held[-1] == 0
