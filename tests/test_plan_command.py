"""The planner as a command: what it refuses, writes, compiles and times."""

import json
import subprocess
from types import SimpleNamespace

import pytest
from conftest import needs_gpu_packages

import plan as command
import train
from command_line import plan_file
from command_line.options import ModelOptions, PipelineOptions
from planning_run import compiling
from planning_run.report import Timed
from training_run.train_options import TrainOptions
from vocabpp_jax import plan

# cuDNN's attention is traced, which takes jax's GPU packages and no GPU.
pytestmark = [pytest.mark.a100, needs_gpu_packages]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "tpu"], "gpu is 'tpu'"),
        (["--memory", "500"], "memory is 500"),
        (["--plot", "plan.doc"], "plot is plan.doc"),
        (["--output", "plan.txt"], "output is plan.txt"),
        (["--compile", "0"], "compile is 0"),
        (["--gpus", "16", "--max-tensor", "1", "--global-batch", "9", "--layers", "8"], "the nearest batch"),
        (["--memory", "1", "--schedules", "1f1b", "--methods", "vocab-2", "--no-compile"], "no plan fits"),
    ],
)
def test_the_command_refuses_with_status_2(arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_a_plan_is_ranked_drawn_and_written_as_what_train_runs(tmp_path, capsys):
    file, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    size = "--layers 8 --hidden 512 --heads 8 --seq 512 --vocab-size 50000 --dtype bfloat16".split()
    which = "--model gpt-small --gpus 4 --gpu a100 --global-batch 32 --schedules 1f1b --memory 8 --no-compile".split()
    command.main([*which, *size, "--json", "-", "--output", str(file), "--plot", str(picture)])
    found = json.loads(capsys.readouterr().out)
    best, fields = found["plans"][0], plan.Choice.__dataclass_fields__
    assert set(fields) <= set(best) and "compiled_bytes" not in best
    assert [p["step_seconds"] for p in found["plans"]] == sorted(p["step_seconds"] for p in found["plans"])
    assert best["estimated_bytes"] <= 8 * 2**30 and picture.stat().st_size > 5_000
    options = TrainOptions(plan=str(file)).planned()
    assert options.pipeline.stages == best["stages"] and options.pipeline.method == best["method"]
    assert options.pipeline.microbatches == best["microbatches"] and options.model.vocab_size == 50_000
    assert options.pipeline.devices == 4


def test_of_plans_timed_on_this_machine_the_fastest_is_written(tmp_path, monkeypatch, capsys):
    cores = SimpleNamespace(timed=lambda plans, run_of: [Timed(each, [9.0 - n]) for n, each in enumerate(plans)])
    monkeypatch.setattr(command, "on_cores", lambda run: run(cores))
    which = "--model gpt-tiny --gpus 2 --gpu a100 --global-batch 8 --stages 2 --schedules 1f1b --no-compile --show 3"
    command.main([*which.split(), "--time-steps", "--json", "-", "--output", str(tmp_path / "plan.json")])
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert [each["measured_seconds"] for each in plans] == [7.0, 8.0, 9.0]
    assert plans[0]["step_seconds"] > plans[-1]["step_seconds"]
    best = TrainOptions(plan=str(tmp_path / "plan.json")).planned().pipeline
    assert (best.method, best.microbatches) == (plans[0]["method"], plans[0]["microbatches"])


def test_a_plan_and_other_options_must_agree(tmp_path, capsys):
    file = tmp_path / "plan.json"
    file.write_text(plan_file.to_text(ModelOptions(model="gpt-tiny"), PipelineOptions(stages=2), {}))
    agreeing = TrainOptions(plan=str(file), pipeline=PipelineOptions(stages=2))
    assert agreeing.planned().model.model == "gpt-tiny"
    with pytest.raises(SystemExit) as stop:
        train.main(["--plan", str(file), "--stages", "8"])
    assert stop.value.code == 2 and "stages is 8, and in plan" in capsys.readouterr().err
    file.write_text("{}")
    with pytest.raises(ValueError, match="not a plan"):
        TrainOptions(plan=str(file)).planned()


def test_what_has_been_compiled_is_not_compiled_again(tmp_path, monkeypatch):
    asked_for = []

    def run(command, input, **options):
        asked_for.append(json.loads(input))
        return subprocess.CompletedProcess(command, 0, '{"peak_bytes": 7, "seconds": 1.0}\n', "")

    monkeypatch.setattr(compiling.subprocess, "run", run)
    jobs = [compiling.Job("a100", ModelOptions(model="gpt-tiny"), PipelineOptions(stages=p)) for p in (2, 4, 2)]
    for _ in range(2):
        assert [found["peak_bytes"] for found in compiling.results(jobs, tmp_path, 1)] == [7, 7, 7]
    assert [request["pipeline"]["stages"] for request in asked_for] == [2, 4]


def test_a_plan_that_cannot_be_compiled_says_why(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 2, "", "a warning\nerror: stages is 3\n")
    monkeypatch.setattr(compiling.subprocess, "run", lambda *command, **options: failed)
    job = compiling.Job("a100", ModelOptions(model="gpt-tiny"), PipelineOptions(stages=3))
    assert list(compiling.results([job], tmp_path, 1)) == [{"refused": "stages is 3"}]
    assert not list(tmp_path.iterdir())


def test_a_compiled_plan_takes_what_was_estimated_and_fits(tmp_path):
    out, size = tmp_path / "out.json", "--layers 4 --hidden 512 --heads 4 --seq 512 --vocab-size 16384"
    which = "--model 4B --gpus 4 --gpu a100 --global-batch 16 --stages 2 --schedules 1f1b --methods vocab-2 --compile 1"
    memory = ["--memory", "2", "--kept", str(tmp_path), "--output", str(tmp_path / "plan.json"), "--json", str(out)]
    command.main([*which.split(), *size.split(), "--microbatch-sizes", "1", "2", *memory])
    best = json.loads(out.read_text())["plans"][0]
    assert best["compiled_bytes"] <= 2 * 2**30
    assert best["estimated_bytes"] == pytest.approx(best["compiled_bytes"], rel=0.15)
