"""Restarts of the training script: what may change, who hears of a failure, and with which status a run ends."""

import json
import signal
import time
from pathlib import Path

import pytest
from test_train import CHECKPOINTS, SMALL, cache, compiled, records, start_script, start_together, text, wait_until  # noqa: F401

import train as script
from speed_measure.processes import free_port
from vocabpp_jax import checkpoints
from vocabpp_jax.runtime.faults import SAVED


def sentence(capsys, *arguments):
    """What the command says and with which status it ends, without training."""
    with pytest.raises(SystemExit) as stop:
        script.main([*arguments])
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return stop.value.code, said


@pytest.mark.thorough
def test_whatever_decides_the_numbers_is_refused_by_name_or_accepted(text, monkeypatch, capsys):  # noqa: F811
    run = f"{SMALL} --data {text} --steps 3 {CHECKPOINTS} --eval-every 99".split()
    script.main(run)
    with monkeypatch.context() as patch:
        patch.setattr(script, "run_training", lambda run: pytest.fail("training began"))
        for changed, expected in {
            "--z-loss 1e-4": "z_loss was 0.0 and is 0.0001",
            "--label-smoothing 0.1": "label_smoothing was 0.0 and is 0.1",
            "--soft-cap 30": "soft_cap was None and is 30.0",
            "--microbatches 2": "tokens_per_step was 96 and is 64",
            "--microbatch-size 4": "tokens_per_step was 96 and is 192",
            "--data-parallel 2": "tokens_per_step was 96 and is 192",  # the same command on twice the devices
            "--weight-decay 0 --warmup 1": "warmup was 0 and is 1, weight_decay was 0.1 and is 0.0",
            "--document-masks": "document_masks was False and is True",
        }.items():
            status, said = sentence(capsys, *run, *changed.split())
            assert status == 2 and f"3 is from a run in which {expected}; give the old values" in said
    script.main([*run, "--data-parallel", "2", "--microbatch-size", "1"])  # the same tokens a step
    changed = ["--z-loss", "1e-4", "--steps", "4", "--accept-changes"]
    script.main([*run, *changed])
    assert checkpoints.steps_in("checkpoints") == [3, 4]
    identity = checkpoints.read_record("checkpoints", 4)["identity"]
    assert identity["z_loss"] == 1e-4 and identity["tokens_per_step"] == 96
    script.main([*run, *changed[:-1]])  # what was accepted once is what the run is now


@pytest.mark.thorough
def test_a_checkpoint_that_is_damaged_is_made_again_by_training(text, capsys):  # noqa: F811
    run = f"{SMALL} --data {text} --steps 6 {CHECKPOINTS} --eval-every 99".split()
    script.main(run)
    expected = checkpoints.read_record("checkpoints", 6)["arrays"]
    (Path("checkpoints/6/run/metadata")).write_bytes(b"")
    script.main(run)
    assert "checkpoints/6 is damaged" in capsys.readouterr().out
    assert checkpoints.steps_in("checkpoints") == [3, 6]
    assert checkpoints.read_record("checkpoints", 6)["arrays"] == expected


def test_a_signal_without_a_folder_for_checkpoints_is_no_reason_to_start_again(text, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(script.Termination, "requested", lambda self, step: "SIGTERM" if step == 2 else None)
    status, said = sentence(capsys, *f"{SMALL} --data {text} --steps 5 --output out --eval-batches 1".split())
    assert status == 1 and "SIGTERM at step 2; there is no checkpoint to resume from" in said


@pytest.mark.parametrize(
    "options, expected",
    [
        (
            "--checkpoint-dir s3://bucket/x",
            "'s3://bucket/x' is not a place for checkpoints; give a local folder or gs:",
        ),
        ("--checkpoint-dir gs:/bucket/x", "'gs:/bucket/x' is not a place for checkpoints"),
        ("--checkpoint-dir gs://", "'gs://' is not a place for checkpoints"),
        ("--output gs://bucket/x", "output is 'gs://bucket/x'; it must be on this machine's file system"),
        ("--data s3://bucket/x", "data is 's3://bucket/x'; it must be on this machine's file system"),
        ("--export gs://bucket/x", "export is 'gs://bucket/x'; it must be on this machine's file system"),
        ("--tokenizer hf://x/y", "tokenizer is 'hf://x/y'; it must be on this machine's file system"),
        ("--output ~nobody-by-this-name/x", "names a user that does not exist"),
        ("--checkpoint-dir ~nobody-by-this-name/x", "names a user that does not exist"),
    ],
)
def test_paths_that_cannot_be_are_refused(options, expected, capsys):
    status, said = sentence(capsys, *options.split())
    assert status == 2 and expected in said
    assert not list(Path().iterdir())


def test_checkpoints_in_a_bucket_need_a_local_output(capsys, monkeypatch):
    monkeypatch.setattr(checkpoints.folders, "find_spec", lambda name: name == "tensorflow")
    status, said = sentence(capsys, "--checkpoint-dir", "gs://bucket/x")
    assert status == 2 and "give a local folder as output" in said


def test_a_bucket_that_nothing_installed_can_reach_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(checkpoints.folders, "find_spec", lambda name: None)
    status, said = sentence(capsys, "--checkpoint-dir", "gs://bucket/x", "--output", "out")
    assert status == 2 and "'gs://bucket/x' needs the package gcsfs; pip install 'vocabpp-jax[gcs]'" in said


def test_a_tilde_that_no_shell_has_expanded_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = "--checkpoint-dir ~/a --output ~/b --data ~/c.txt --tokenizer ~/d.json --export ~/e --model ~/f"
    options = script.parse(script.TrainOptions, "", arguments.split())
    assert options.checkpoint.checkpoint_dir == f"{tmp_path}/a" and options.output == f"{tmp_path}/b"
    assert (options.data.data, options.data.tokenizer) == (f"{tmp_path}/c.txt", f"{tmp_path}/d.json")
    assert (options.export, options.model.model) == (f"{tmp_path}/e", f"{tmp_path}/f")
    writer = checkpoints.Writer("~/g")
    writer.close()
    assert (tmp_path / "g/.lock").exists() and not Path("~").exists()


# --- two processes


def end_of(processes, timeout=200):
    """Status and standard error of each."""
    try:
        said = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(process.returncode, errors) for process, errors in zip(processes, said, strict=True)]


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "own, expected",
    [
        (
            ["", "--lr 0.1"],
            "the options must be the same in all processes: lr is 0.003 in process 0 and 0.1 in process 1",
        ),
        (["", "--data other.txt"], "what decides the result must be the same in all processes: data is "),
        (["", "--heads 3"], "heads is 3; it must divide hidden, which is 32"),  # before it has joined
        (["--stages 1"] * 2, "2 processes have 2 devices, and the mesh of data 1 × pipe 1 takes 1, none of process 1"),
    ],
    ids=["options", "data", "wrong in one", "more processes than the mesh has devices"],
)
def test_what_is_wrong_in_one_process_ends_all_with_the_same_sentence(own, expected, text):  # noqa: F811
    Path("other.txt").write_text(Path(text).read_text()[::-1])
    arguments = f"{SMALL} --data {text} --steps 5 --output out {CHECKPOINTS}"
    for status, said in end_of(start_together(2, arguments, own)):
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert status == 2 and len(errors) == 1 and expected in errors[0] and "Traceback" not in said
    assert not Path("checkpoints").exists() and not Path("out").exists()


@pytest.mark.thorough
def test_a_process_that_is_left_alone_ends_in_a_sentence(text):  # noqa: F811
    begun = time.monotonic()
    alone = f"--coordinator localhost:{free_port()} --processes 2 --process-id 0 --join-timeout 5"
    ((status, said),) = end_of([start_script(f"{SMALL} --data {text} {alone}")])
    assert status and "cannot join the other processes at localhost:" in said and time.monotonic() - begun < 100


@pytest.mark.thorough
def test_a_signal_to_one_of_two_processes_saves_and_both_say_that_the_run_goes_on(text):  # noqa: F811
    both = start_together(2, f"{SMALL} --data {text} --steps 100000 --output out {CHECKPOINTS} --eval-every 1000000")
    try:
        wait_until(lambda: Path("checkpoints/3").exists() or any(p.poll() is not None for p in both))
        both[1].send_signal(signal.SIGTERM)
    finally:
        ends = end_of(both)
    assert [status for status, _ in ends] == [SAVED, SAVED], ends
    assert checkpoints.steps_in("checkpoints")[-1] == records("out")[-1]["step"]
    assert json.loads(Path("out/config.json").read_text())["processes"] == 2
