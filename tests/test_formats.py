import csv
import io
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vocabpp_jax.schedules import SCHEDULES, build, evaluation, lower, methods_of
from vocabpp_jax.schedules.simulation import formats
from vocabpp_jax.schedules.simulation.durations import Durations
from vocabpp_jax.schedules.simulation.formats import Action
from vocabpp_jax.schedules.simulation.simulator import simulate

CASES = [(schedule, method) for schedule in SCHEDULES for method in methods_of(schedule)]


@given(st.sampled_from(CASES), st.integers(1, 5), st.integers(1, 9))
def test_a_schedule_comes_back_from_json(case, p, m):
    for schedule in (build(*case, p=p, m=m), evaluation(build(*case, p=p, m=m))):
        assert formats.from_json(formats.to_json(schedule)) == schedule


@pytest.mark.parametrize(("written", "read"), [(0, 0), (2, 2), (False, 0), (True, 1)])
def test_a_program_order_comes_back_from_json_also_as_an_earlier_version_wrote_it(written, read):
    data = json.loads(formats.to_json(build("1f1b", "vocab-2", p=2, m=2)))
    data["order"]["ends_apart"] = written
    found = formats.from_json(json.dumps(data)).order.ends_apart
    assert found == read and type(found) is int


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
    assert {"0EF0", "1EF0", "0S0", "1S0", "0T0", "1T0", "0EB0", "1EB0", "0G0"} <= set(cells)
    naive = formats.to_csv(build("1f1b", "vocab-naive", p=1, m=12))
    assert "0SM10" in naive and "0SE1," in naive
    assert Action(0, "S1", 0) in formats.from_csv(naive)[0]


def test_empty_cells_are_a_wait_and_anything_else_is_refused():
    assert formats.from_csv("0F0,,0B0\n") == ((Action(0, "F", 0), Action(0, "B", 0)),)
    with pytest.raises(ValueError, match="rank 1, column 2 is 'F0'"):
        formats.from_csv("0F0\n1F0,1B0,F0\n")


# What torch.distributed.pipelining makes of a cell, by its beginning; None where it refuses it.
TORCH = re.compile(r"(\d+)(F|I|B|W|UNSHARD|RESHARD|REDUCE_GRAD|SEND_F|RECV_F|SEND_B|RECV_B)(\d*)")


def as_torch_reads(text):
    rows = [[cell.strip() for cell in row if cell.strip()] for row in csv.reader(io.StringIO(text))]
    matches = [[TORCH.match(cell) for cell in row] for row in rows]
    return None if any(m is None for row in matches for m in row) else [[m.groups() for m in row] for row in matches]


@pytest.mark.parametrize("case", CASES)
def test_torch_reads_what_is_written_for_it_and_misreads_nothing_else(case):
    schedule = build(*case, p=3, m=5)
    rows = formats.actions_of(schedule, vocabulary=False)
    read = as_torch_reads(formats.to_csv(schedule, vocabulary=False))
    assert read == [[(str(a.stage), a.name, str(a.microbatch)) for a in row] for row in rows]
    # Every stage on one rank, with a full backward or its two halves for every microbatch: what torch validates.
    for i in range(5):
        done = [(stage, name) for row in read for stage, name, microbatch in row if int(microbatch) == i]
        for stage in range(schedule.stages):
            kinds = sorted(name for of, name in done if int(of) == stage)
            assert kinds in (["B", "F"], ["F", "I", "W"])
    for row in formats.to_csv(schedule).splitlines():
        for cell in row.split(","):
            ours, theirs = formats.from_csv(cell)[0][0], TORCH.match(cell)
            assert theirs is None or theirs.groups() == (str(ours.stage), ours.name, str(ours.microbatch))


def test_comments_blank_lines_and_a_byte_order_mark_are_accepted():
    plain = "0F0,0B0\n1F0,1B0\n"
    assert formats.from_csv(
        "\ufeff# a comment, with a comma\n\n0F0 , 0B0\r\n  # more\n\n1F0,1B0\n"
    ) == formats.from_csv(plain)
    assert formats.from_csv('0F0\n""\n') == ((Action(0, "F", 0),), ())  # a rank that runs nothing


@pytest.mark.parametrize(
    "cell, name",
    [(f"0{name}1", name) for name in ("SEND_F", "RECV_F", "SEND_B", "RECV_B")]
    + [(f"1{name}", name) for name in ("UNSHARD", "RESHARD", "REDUCE_GRAD")]
    + [("(0F1;1B0)OVERLAP_F_B", "OVERLAP_F_B")],
)
def test_torchs_other_actions_are_refused_by_name(cell, name):
    with pytest.raises(ValueError) as problem:
        formats.from_csv(f"0F0,{cell}\n")
    assert f"rank 0, column 1 is {cell!r}, an {name} of torch; give its compute-only form" in str(problem.value)


@pytest.mark.parametrize(
    "text", ["", "\n\n", "# nothing\n", "0X3", "0F", "F0", "-1F0", "0F0 1", "0F" + "9" * 5000, '"' + "x" * 200_000]
)
def test_what_is_no_schedule_is_refused_in_a_sentence(text):
    with pytest.raises(ValueError) as problem:
        formats.from_csv(text)
    assert len(str(problem.value)) < 300 and "\n" not in str(problem.value)


def test_names_of_files_written_before_are_read():
    assert formats.from_csv("0IF0,0IB3") == formats.from_csv("0EF0,0EB3") == ((Action(0, "IF", 0), Action(0, "IB", 3)),)


@pytest.mark.parametrize("case", [case for case in CASES if case[1] == "baseline"])
def test_a_schedule_comes_back_from_the_csv_also_with_W_passes(case):
    schedule = build(*case, p=4, m=6)
    text = formats.to_csv(schedule, vocabulary=False)
    again = formats.schedule_from_csv(text)
    assert formats.to_csv(again, vocabulary=False) == text
    assert again.placement == schedule.placement and again.splits_backward == schedule.splits_backward
    lower(again)


def test_a_full_backward_among_split_ones_is_split():
    again = formats.schedule_from_csv("0F0,0F1,0B0,0I1,0W1\n1F0,1I0,1W0,1F1,1B1\n")
    assert formats.to_csv(again, vocabulary=False) == "0F0,0F1,0I0,0W0,0I1,0W1\n1F0,1I0,1W0,1F1,1I1,1W1\n"


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("0F0,0EF0,0B0", "rank 0 runs 0EF0, a part of the vocabulary layers"),
        ("0F0,0B0\n0F1,0B1", "stage 0 is on rank 0 and on rank 1"),
        ("0F0,0B0\n2F0,2B0", r"the stages are \[0, 2\]"),
        ("0B0,0F0", "waits forever"),
        ("0F0,0B0,0F1", "B"),
    ],
)
def test_a_csv_that_makes_no_schedule_is_refused(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        formats.schedule_from_csv(text)


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
    timeline = simulate(
        lower(build("1f1b", "vocab-2", p=3, m=4)), Durations(S=0.2, T=0.2, hidden_broadcast=0.1, transfer=0.05)
    )
    trace = json.loads(formats.to_trace(timeline, microseconds=1e3))["traceEvents"]
    slices = [e for e in trace if e["ph"] == "X"]
    assert sum(e["cat"] in "FBST" for e in slices) == 4 * 3 * 4
    assert sum(e["cat"] == "hidden_broadcast" for e in slices) == 3 * 4
    assert sum(e["cat"] == "receive" for e in slices) == 2 * 2 * 4
    assert max(e["ts"] + e["dur"] for e in slices if e["cat"] == "B") == pytest.approx(
        1e3 * max(s.end for s in timeline.spans() if s.kind == "B")
    )
    held = [e["args"]["held"] for e in trace if e["ph"] == "C" and e["pid"] == 0]
    assert max(held) == 4 and held[-1] == 0


@given(st.data())
def test_any_json_of_the_right_shape_is_a_schedule_or_refused_in_a_sentence(data):
    values = json.loads(formats.to_json(build("1f1b", "vocab-2", p=2, m=1)))
    at = values
    while isinstance(at, (dict, list)) and at and data.draw(st.integers(0, 4)):
        key = data.draw(st.sampled_from(sorted(at))) if isinstance(at, dict) else data.draw(st.integers(0, len(at) - 1))
        inside = at[key]
        if not isinstance(inside, (dict, list)) or not data.draw(st.integers(0, 3)):
            at[key] = data.draw(
                st.none() | st.integers() | st.floats() | st.text(max_size=3) | st.just([]) | st.just({})
            )
            break
        at = inside
    try:
        formats.from_json(json.dumps(values))
    except ValueError as problem:
        assert "\n" not in str(problem)
