import json
from pathlib import Path

import pytest

import simulate
from vocabpp_jax.schedules.simulation import formats

PUBLISHED = Path(__file__).parent.parent / "docs" / "paper"
SMALL = ["--stages", "4", "--microbatches", "8", "--model", "gpt-small", "--layers", "8"]


def run(arguments, capsys):
    simulate.main(arguments)
    return capsys.readouterr().out


def test_json_has_time_bubble_mfu_and_what_is_in_flight(capsys):
    data = json.loads(run([*SMALL, "--json", "-"], capsys))
    assert data["iteration_ms"] > 0 and 0 < data["bubble_ratio"] < 1 and 0 < data["mfu"] < 1
    assert data["peak_in_flight"] == [5, 4, 3, 2]


def test_it_prints_a_line_and_writes_pictures_traces_and_csv(tmp_path, capsys):
    files = {name: tmp_path / f"x.{end}" for name, end in (("plot", "svg"), ("trace", "json"), ("csv", "csv"))}
    out = run([*SMALL, *(word for name, path in files.items() for word in (f"--{name}", str(path)))], capsys)
    assert "vocab-2" in out and "%" in out
    assert "F forward" in files["plot"].read_text()
    assert json.loads(files["trace"].read_text())["traceEvents"]
    assert len(formats.from_csv(files["csv"].read_text())) == 4


def test_compare_sorts_the_whole_family_by_time(tmp_path, capsys):
    out = run([*SMALL, "--compare", "--json", str(tmp_path / "x.json")], capsys)
    times = [r["iteration_ms"] for r in json.loads((tmp_path / "x.json").read_text())["results"]]
    assert times == sorted(times) and len(times) > 20
    assert all(name in out for name in ("v-half", "redis", "1f1b"))


def test_a_larger_vocabulary_makes_sharding_pay_more(capsys):
    ratios = []
    for V in ("64000", "256000"):
        command = [*SMALL, "--vocab-size", V, "--json", "-"]
        ms = {
            method: json.loads(run([*command, "--method", method], capsys))["iteration_ms"]
            for method in ("baseline", "redis", "vocab-2")
        }
        assert ms["vocab-2"] < ms["redis"] <= ms["baseline"]
        ratios.append(ms["baseline"] / ms["vocab-2"])
    assert ratios[1] > ratios[0] > 1


def test_measured_times_are_predicted_row_by_row(capsys):
    times = ["--times", str(PUBLISHED / "pass_times_8xA100.csv")]
    data = json.loads(run([*times, "--method", "vocab-1", "--vocab-size", "64000", "--json", "-"], capsys))
    assert len(data["rows"]) == 20
    for row in data["rows"]:
        assert set(row) == {"method", "seq_length", "vocab_size", "predicted_ms", "measured_ms"}
        assert abs(row["predicted_ms"] / row["measured_ms"] - 1) < 0.05
    chosen = next(r for r in data["rows"] if r["method"] == "vocab-1" and r["vocab_size"] == 64000)
    assert data["iteration_ms"] == chosen["predicted_ms"]
    assert "on average" in run(times, capsys)


def test_durations_can_be_given(capsys):
    given = ["--stages", "4", "--microbatches", "16", "--schedule", "zb-h1", "--method", "baseline"]
    data = json.loads(run([*given, "--durations", "F=100,B=130,W=80,transfer=1,H=0", "--json", "-"], capsys))
    assert data["busy_ms"] == [16 * 310.0] * 4 and data["mfu"] is None
    assert data["longest_wait_ratio"] == pytest.approx(1 - 16 * 310 / (16 * 310 + 3 * 150), abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--schedule", "2f2b"], "schedule is '2f2b'"),
        (["--method", "magic"], "method is 'magic'"),
        (["--stages", "0"], "p is 0"),
        (["--stages", "0", "--method", "redis"], "stages is 0"),
        (["--stages", "0", "--compare"], "nothing can be built; gpipe with baseline: p is 0"),
        (["--gpu", "v100"], "gpu is 'v100'"),
        (["--model", "5B"], "5B"),
        (["--times", "nowhere.csv"], "no such file"),
        (["--durations", "F=1,X=2"], "durations has 'X=2'"),
        (["--durations", "F=-1"], "durations has 'F=-1'"),
        (["--durations", "F=0,B=0"], "F, B or W must take some time"),
        (["--plot", "x.pdf"], ".png or .svg"),
        (["--csv", "/nowhere/x.csv"], "/nowhere/x.csv cannot be written"),
        (["--microbatches", "many"], "many"),
        (["--stages", "33"], "layers is 32"),
        (["--mtp-depth", "-1"], "mtp_depth is -1"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence(arguments, names, capsys):
    with pytest.raises(SystemExit) as stopped:
        simulate.main(arguments)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1 and names in said
