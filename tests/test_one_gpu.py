"""What one GPU can tell: each part at tiny size on CPUs, and what is made of what the parts have measured."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import one_gpu
import simulate
from one_gpu_parts import constants, gpu_page, mock, pass_table, pass_times
from one_gpu_parts.gpu_measurements import Measured, schedule_of
from one_gpu_parts.gpu_sizes import TINY, WHOLE
from one_gpu_parts.page_passes import NOT_YET
from one_gpu_parts.passes import PASSES, Passes, times
from one_gpu_parts.results import Results
from vocabpp_jax import make_mesh, models, schedules
from vocabpp_jax.schedules.simulation.cost import GPUS, load_gpu
from vocabpp_jax.schedules.simulation.measured import read_pass_times

DOCS = Path(__file__).parents[1] / "docs"
FOUND = DOCS / "results" / "gpu"
H100 = load_gpu("h100-80g")
SECTION = re.compile(r"(?ms)^##? (.*?)\n(.*?)(?=^## |\Z)")


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("part", one_gpu.PARTS)
def test_every_part_runs_at_tiny_size_without_a_gpu(part, tmp_path):
    assert one_gpu.main(["--tiny", "--only", part, "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / f"{part}.json").read_text())
    assert found["complete"] and not found["failed"] and not found["left_out"]
    assert found["cases"] or "skipped" in found
    if part == "parity":
        assert all(case["holds"] for case in found["cases"])
    if part == "stages":
        assert not found["cases"][0]["mocked"] and min(found["cases"][0]["step_ms"]) > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "network"], "no part 'network'"),
        (["--only", "torch", "--skip", "torch"], "skip leaves no part"),
        (["--minutes", "0"], "minutes is 0"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(arguments, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        one_gpu.main(arguments)
    assert said in capsys.readouterr().err


def test_the_parts_need_no_more_than_jax_flax_optax_and_numpy():
    blocked = ("tyro", "matplotlib", "grain", "orbax", "safetensors", "tokenizers", "torch", "tensorboardX")
    code = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in blocked)
    code += "import one_gpu_parts.__main__, one_gpu_parts.gpu_page, one_gpu_parts.pass_table"
    subprocess.run([sys.executable, "-c", code], cwd=Path(one_gpu.__file__).parent, check=True)


def test_the_mocked_topology_is_asked_for_before_the_client_is_made(monkeypatch):
    asked = {}
    monkeypatch.setattr(jax.config, "update", lambda name, value: asked.__setitem__(name, value))
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    mock.pretend(8, 3)
    assert asked == {"jax_mock_gpu_topology": "1x8x1", "jax_pjrt_client_create_options": {"node_id": 3}}
    assert mock.os.environ["XLA_FLAGS"] == "--xla_a=1 --xla_gpu_shard_autotuning=false"


def test_a_case_that_fails_keeps_its_traceback_and_the_next_goes_on(tmp_path):
    path = tmp_path / "part.json"
    results = Results(path, deadline=float("inf"))
    results.case("bad", lambda: 1 / 0)
    results.case("good", lambda: {"us": 1.0})
    assert "ZeroDivisionError" in json.loads(path.read_text())["failed"][0]["traceback"]
    late = Results(path, deadline=0.0)
    late.go_on()
    late.case("good", lambda: pytest.fail("it is there already"))
    late.case("other", lambda: pytest.fail("there is no time"), needs=1.0)
    found = json.loads(path.read_text())
    assert [case["case"] for case in found["cases"]] == ["good"] and found["left_out"] == ["other"]


# --- passes ----------------------------------------------------------------------------------------------------------


def passes_of(method, schedule="1f1b", names=PASSES):
    config = models.named("gpt-tiny", layers=2, hidden=8, heads=2, seq=4, vocab_size=19)
    built = schedules.build(schedule, method, p=1, m=4)
    return Passes(models.build(config), built, make_mesh(1, devices=jax.devices()[:1]), names=names, swept=8)


@pytest.mark.parametrize(
    ("method", "schedule", "names"),
    [
        ("baseline", "1f1b", {"IF", "F", "B", "H", "IB"}),
        ("vocab-1", "zb-h1", {"IF", "F", "B", "W", "S", "stats", "T", "G", "IB"}),
        ("vocab-2", "1f1b", {"IF", "F", "B", "S", "stats", "T", "C1", "G", "IB"}),
        ("vocab-naive", "1f1b", {"IF", "F", "B", "S1", "S2", "stats", "T", "G", "IB"}),
    ],
)
def test_the_passes_are_those_of_the_program(method, schedule, names):
    assert set(passes_of(method, schedule).instructions) == names


def test_a_pass_is_repeated_as_often_as_it_is_told_and_does_what_the_executor_does():
    """Every round over the cells adds the same gradient."""
    passes = passes_of("vocab-1", names=("S", "T"))
    program, make = passes.compile(4, 19)
    params, batch = make()
    at = [float(program(params, batch, np.array(counts, np.int32))) for counts in ([0, 4, 0], [0, 8, 0], [0, 16, 0])]
    assert abs(at[1] - at[0]) > 1 and at[2] - at[1] == pytest.approx(2 * (at[1] - at[0]), rel=1e-4)
    assert passes.program.rings["P"] >= 2


def test_times_are_what_repeats_add_less_what_stands_between_them(monkeypatch):
    cost = np.array([3e-3, 5e-3, 1e-3])  # S, T, and the sweep alone
    monkeypatch.setattr("one_gpu_parts.passes.seconds", lambda run: run())
    passes = passes_of("vocab-1", names=("S", "T"))
    found = times(passes, lambda params, batch, counts: 0.5 + float(cost @ np.asarray(counts)), None, None, repeats=2)
    assert found == {"idle": pytest.approx(1e-3), "S": pytest.approx(2e-3), "T": pytest.approx(4e-3)}


def test_a_stages_layers_are_on_the_line_through_what_was_measured():
    case = {"model": "4B", "seq": 2048, "schedule": "1f1b", "method": "baseline"}
    cases = [case | {"case": str(n), "layers": n, "us": {"F": 10.0 + 90.0 * n}} for n in (1, 4)]
    measured = Measured({"passes": {"cases": cases}})
    assert measured.layers("4B", 2048, "F", 6) == pytest.approx(550e-6)
    assert measured.layers("4B", 4096, "F", 6) is None


# --- constants -------------------------------------------------------------------------------------------------------


def test_the_constants_of_a_made_up_gpu_are_found_again():
    true = {"layer_traffic": 40.0, "logit_traffic": 20.0, "weight_traffic": 6.0, "launch": 2e-5, "edge_traffic": 12.0}
    gpu = dataclasses.replace(
        H100,
        matmul_efficiency=0.6,
        half_size=0.0,
        attention_efficiency=0.3,
        traffic_efficiency=0.8,
        overhead=5e-6,
        **true,
    )
    cases = [
        {"case": "copy", "us": 1.0, "per_second": 0.8 * gpu.memory_bandwidth},
        {"case": "product 8192 x 8192 x 8192", "us": 1.0, "per_second": 0.6 * gpu.peak_flops},
        {"case": "attention, 24 heads of 128, s=2048", "us": 1.0, "per_second": 0.3 * gpu.peak_flops},
    ]
    for case in pass_times.cases(dataclasses.replace(WHOLE, rows=WHOLE.rows[:2])):
        one = {f.name: getattr(case, f.name) for f in dataclasses.fields(case)} | {"case": case.key}
        wanted = ("F", "B", "W") if case.schedule == "zb-h1" else ("F", "B")
        wanted = wanted if case.names[0] == "F" else ("H",) if case.method == "baseline" else ("S", "T")
        us = dict.fromkeys(wanted, 1.0)
        modelled = constants.compared(Measured({"passes": {"cases": [one | {"us": us}]}}), gpu)
        cases.append(one | {"us": us | {name.split(": ")[1]: 1e6 * s for name, _, s in modelled}})
    loops = {"case": "loops", "kind": "loops", "command_buffers": "default", "skipped_us": 5.0}
    found, missed = constants.constants(Measured({"passes": {"cases": cases}, "overhead": {"cases": [loops]}}), H100)
    assert missed < 1e-3
    assert {name: found[name] for name in true} == pytest.approx(true, rel=0.02)
    assert found["overhead"] == pytest.approx(5e-6) and found["matmul_efficiency"] == pytest.approx(0.6)


def test_constants_are_replaced_and_nothing_else(tmp_path):
    file = tmp_path / "gpu.toml"
    file.write_text((GPUS / "h100-80g.toml").read_text())
    constants.write(file, {"launch": 1.25e-5, "half_size": 64.0})
    changed = [(a, b) for a, b in zip(file.read_text().splitlines(), (GPUS / "h100-80g.toml").read_text().splitlines(),
                                      strict=True) if a != b]  # fmt: skip
    assert len(changed) == 2 and load_gpu(str(file)).launch == 1.25e-5 and load_gpu(str(file)).half_size == 64
    with pytest.raises(ValueError, match="0 lines for 'speed'"):
        constants.write(file, {"speed": 1.0})


# --- the page and the tables -----------------------------------------------------------------------------------------


def test_the_page_of_no_measurement_pretends_nothing(tmp_path):
    gpu_page.write(tmp_path / "gpu.md", Measured(), WHOLE, H100)
    rows = [line for line in (tmp_path / "gpu.md").read_text().splitlines() if line.startswith("|")]
    assert sum(NOT_YET in row for row in rows) > 100
    assert not [row for row in rows if "e-0" in row or "TFLOP" in row or "TB" in row]


def test_the_committed_page_tables_and_constants_are_those_of_the_committed_measurements(tmp_path):
    measured = Measured.read(FOUND)
    gpu_page.write(tmp_path / "gpu.md", measured, WHOLE, H100)
    written, committed = (dict(SECTION.findall(path.read_text())) for path in (tmp_path / "gpu.md", DOCS / "gpu.md"))
    # Iterations follow the simulator too, which has tests of its own.
    assert written.pop("Iterations") and committed.pop("Iterations") and written == committed
    for path in pass_table.write(measured, WHOLE, tmp_path):
        assert path.read_text() == (FOUND / path.name).read_text()
    found, _ = constants.constants(measured, H100)
    assert {name: getattr(H100, name) for name in found} == pytest.approx(found, rel=5e-3)


def test_every_case_that_was_compared_on_the_gpu_holds():
    compared = Measured.read(FOUND).cases("parity", precision="highest")
    assert len(compared) >= 15 and all(case["holds"] for case in compared)


def test_a_real_stage_takes_what_its_measured_passes_take_together():
    measured = Measured.read(FOUND)
    for case in measured.cases("stages", method="vocab-2", command_buffers="default"):
        schedule = schedule_of(
            "vocab-2", case["model"], case["p"], case["microbatches"], case["seq"], case["vocab_size"]
        )
        durations = measured.durations(case["model"], case["p"], case["seq"], case["vocab_size"], schedule, H100)
        timeline = schedules.simulate(schedules.lower(schedule), durations)
        busy = timeline.busy[case["stage"]] + durations.overhead * case["runs"]["instructions"]
        assert min(case["step_ms"]) == pytest.approx(1e3 * busy, rel=0.02)


def test_measured_passes_predict_iterations_that_nobody_has_measured(capsys):
    runs = read_pass_times((FOUND / "pass_times_4B_8.csv").read_text())
    assert {run.iteration_ms for run in runs} == {None} and {run.p for run in runs} == {8}
    simulate.main(["--times", str(FOUND / "pass_times_4B_8.csv"), "--gpu", "h100", "--rules", "gpu"])
    said = capsys.readouterr().out
    assert "vocab-2" in said and "error:" not in said


def test_tiny_has_every_kind_of_case_that_the_whole_has():
    kinds = [{(c.schedule, c.rows == c.vocab_size, c.names) for c in pass_times.cases(size)} for size in (TINY, WHOLE)]
    assert kinds[0] == kinds[1]
