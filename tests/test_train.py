"""The main job, made small: it trains, writes what it promises, goes on where it stopped, and runs on two processes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import FAST_COMPILE
from jax.experimental.compilation_cache import compilation_cache

import train as script
from vocabpp_jax import checkpoints, models
from vocabpp_jax.data import train_tokenizer
from vocabpp_jax.models import huggingface
from vocabpp_jax.runtime import faults

REPOSITORY = Path(__file__).parent.parent
SMALL = "--vocab-size 300 --layers 2 --hidden 32 --heads 2 --seq 16 --stages 2 --data-parallel 1 --microbatches 3"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VOCABPP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """Runs of the same options compile once."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for values in (settings, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is settings:
            yield


@pytest.fixture
def text(tmp_path):
    """A grammar that is easy to learn: every word decides the next, but a quarter of the time anything follows."""
    random = np.random.default_rng(0)
    words = [f"{consonant}{vowel}" for consonant in "bcdfgklmnp" for vowel in "aeiou"]
    ids = [0]
    for _ in range(20_000):
        ids.append(random.integers(50) if random.random() < 0.25 else (7 * ids[-1] + 3) % 50)
    path = tmp_path / "text.txt"
    path.write_text(" ".join(words[i] for i in ids))
    return str(path)


def records(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.newest
def test_training_beats_the_unigram_entropy_and_writes_its_files(text, tmp_path, capsys):
    script.main(f"{SMALL} --data {text} --output out --steps 60 --lr 1e-2 --eval-every 40 --eval-batches 2".split())
    measured, config = records("out"), json.loads((tmp_path / "out/config.json").read_text())
    assert [record["step"] for record in measured] == list(range(1, 61))
    assert [record["step"] for record in measured if "validation_loss" in record] == [40, 60]
    assert measured[0]["loss"] == pytest.approx(np.log(300), abs=0.2)
    assert measured[-1]["validation_loss"] < config["corpus"]["unigram_entropy"] - 0.5
    assert measured[5]["learning_rate"] == pytest.approx(1e-2) and measured[59]["learning_rate"] < 1.1e-3
    assert all(record["grad_norm"] > 0 for record in measured)
    assert config["options"]["steps"] == 60 and config["model"]["layers"] == 2 and config["mesh"]["pipe"] == 2
    assert (tmp_path / "out/loss.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert f"validation loss {measured[-1]['validation_loss']:.4f}" in said
    assert f"unigram entropy, {config['corpus']['unigram_entropy']:.4f}" in said and "\x1b" not in said


@pytest.mark.thorough
def test_the_other_options_train_too(text):
    options = f"{SMALL} --data {text} --steps 2 --output out --method baseline --dtype bfloat16 --tie-embeddings"
    script.main([*options.split(), "--data-parallel", "2", "--eval-batches", "1"])
    assert len(records("out")) == 2 and records("out")[0]["loss"] == pytest.approx(np.log(300), abs=0.3)


@pytest.mark.thorough
def test_training_goes_from_one_hugging_face_folder_to_another(text, tmp_path):
    config = models.named("llama-tiny", vocab_size=300)
    before = models.build(config).init(jax.random.key(1))
    huggingface.save(tmp_path / "before", config, before)
    (tmp_path / "tokenizer.json").write_text(train_tokenizer([Path(text).read_text()], 300).to_str())
    options = f"--model {tmp_path}/before --pretrained --tokenizer tokenizer.json --data {text} --steps 1 --warmup 0"
    options += f" --lr 1e-4 --weight-decay 0 --output out --stages {config.layers} --data-parallel 1 --seq 16"
    script.main([*options.split(), "--eval-batches", "1", "--export", "after"])
    _, after = huggingface.load_canonical("after")
    moved = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), before, after)
    assert all(0 < distance < 2e-4 for distance in jax.tree.leaves(moved)), moved  # Adam's first step is the rate


def interrupted(monkeypatch, after):
    """Make training die, as if killed, in the step that follows ``after`` of this life."""
    whole = script.train.make_step

    def make_step(*arguments, **options):
        step, done = whole(*arguments, **options), []

        def dying(state, batch):
            if len(done) == after:
                raise KeyboardInterrupt
            done.append(0)
            return step(state, batch)

        return dying

    monkeypatch.setattr(script.train, "make_step", make_step)


def trained(records):
    return [(record["step"], record["loss"], record["grad_norm"], record["learning_rate"]) for record in records]


CHECKPOINTS = "--checkpoint-dir checkpoints --checkpoint-every 3 --eval-batches 1"


@pytest.mark.newest
def test_a_run_that_died_goes_on_bit_for_bit_and_on_another_layout_to_rounding(text, tmp_path, monkeypatch, capsys):
    run = f"{SMALL} --data {text} --steps 8 --document-masks {CHECKPOINTS}".split()
    script.main([*run, "--output", "straight", "--checkpoint-dir", "others"])
    with monkeypatch.context() as patch:
        interrupted(patch, after=5)
        with pytest.raises(KeyboardInterrupt):
            script.main([*run, "--output", "out"])
    with (tmp_path / "out/metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while it wrote
    shutil.copytree("checkpoints", "elsewhere")
    capsys.readouterr()
    script.main([*run, "--output", "out"])
    assert "resuming from step 3 of checkpoints" in capsys.readouterr().out
    assert trained(records("out")) == trained(records("straight"))
    straight, again = (checkpoints.read_record(folder, 8) for folder in ("others", "checkpoints"))
    assert straight["arrays"] == again["arrays"] and straight["rows"] == again["rows"] == 8 * 6
    assert json.loads((tmp_path / "out/config-3.json").read_text())["options"]["steps"] == 8

    other = "--output moved --checkpoint-dir elsewhere --method baseline --microbatches 1 --microbatch-size 6"
    script.main([*run, *other.split()])
    moved = [record["loss"] for record in records("moved")]
    assert moved == pytest.approx([record["loss"] for record in records("straight")[3:]], rel=1e-5)

    script.main([*run, "--output", "out"])  # nothing is left to do
    assert len(records("out")) == 8


@pytest.mark.thorough
def test_steps_that_are_not_finite_end_the_run_after_a_limit(text, tmp_path, monkeypatch, capsys):
    place = script.Run.place

    def spoilt(run, local):
        local["mask"] = local["mask"] * np.nan if len(records("out")) >= 3 else local["mask"]
        return place(run, local)

    monkeypatch.setattr(script.Run, "place", spoilt)
    options = f"{SMALL} --data {text} --steps 20 --output out --max-skipped 2 --eval-every 30 {CHECKPOINTS}"
    with pytest.raises(SystemExit) as stop:
        script.main(options.split())
    said = capsys.readouterr().err
    assert stop.value.code == 1 and said.startswith("error: 3 steps had a loss or gradient that is not finite")
    assert "the same command resumes from step 3, in checkpoints" in said
    found = records("out")
    assert [record["skipped_steps"] for record in found] == [0, 0, 0, 1, 2, 3] and found[-1]["loss"] is None
    assert found[3]["learning_rate"] == found[5]["learning_rate"]  # the optimizer stands still


def test_sigterm_saves_and_leaves(text, monkeypatch, capsys):
    progress = script.StepProgress.step

    def step(self, number, loss):
        progress(self, number, loss)
        if number == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(script.StepProgress, "step", step)
    with pytest.raises(SystemExit) as stop:
        script.main(f"{SMALL} --data {text} --steps 20 --output out {CHECKPOINTS}".split())
    assert stop.value.code == faults.SAVED == 75
    assert "SIGTERM at step 4: the same command resumes from step 4" in capsys.readouterr().out
    assert len(records("out")) == 4 and checkpoints.steps_in("checkpoints") == [3, 4]


def test_what_changed_since_the_checkpoint_is_refused_and_nothing_is_touched(text, tmp_path, capsys, monkeypatch):
    run = f"{SMALL} --data {text} --steps 3 {CHECKPOINTS}".split()
    script.main(run)  # the output is where the checkpoints are
    monkeypatch.setattr(script, "run_training", lambda run: pytest.fail("training began"))
    (tmp_path / "config").mkdir()
    (tmp_path / "config/config.json").write_bytes(b"\x00{[")
    Path("file").touch()
    before = {path: path.read_bytes() for path in Path("checkpoints").rglob("*") if path.is_file()}
    for changed, sentence in {
        "--lr 0.1 --seed 3": "in which lr was 0.003 and is 0.1, seed was 0 and is 3; give the old values",
        "--lr 0.1 --output new": "checkpoints/3 is from a run in which lr was 0.003 and is 0.1",
        "--layers 4 --output new": "in which layers was 2 and is 4",
        "--checkpoint-dir other --output checkpoints": "which holds a run with checkpoint_dir 'checkpoints'",
        "--output config": "whose config.json cannot be read",
        "--checkpoint-dir file/x --output new": "checkpoint_dir is 'file/x', which cannot be written",
        "--checkpoint-every 0": "checkpoint_every is 0",
    }.items():
        with pytest.raises(SystemExit) as stop:
            script.main([*run, *changed.split()])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and sentence in said and said.count("\n") == 1, said
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.thorough
def test_the_trace_and_its_prediction_and_tensorboard_are_written(text, tmp_path):
    pytest.importorskip("tensorboardX")
    options = f"{SMALL} --data {text} --steps 6 --output out --profile 2 --tensorboard --eval-batches 1"
    script.main(options.split())
    predicted = json.loads((tmp_path / "out/profile/predicted.trace.json").read_text())
    assert "1f1b vocab-2" in predicted["metadata"]["predicted"]
    assert {"F", "B", "S", "T"} <= {event.get("cat") for event in predicted["traceEvents"]}
    traces = list((tmp_path / "out/profile").rglob("*.xplane.pb"))
    assert len(traces) == 1 and all(name in traces[0].read_bytes() for name in (b"F0", b"B0"))
    assert list((tmp_path / "out/tensorboard").iterdir())


def start(*arguments):
    """Start Python by itself, as from a shell, without the eight devices of this process."""
    environment = dict(os.environ, XLA_FLAGS=FAST_COMPILE)
    command = [sys.executable, "-W", "error", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def start_script(arguments):
    return start(str(REPOSITORY / "experiments/train.py"), *arguments.split())


def start_together(count, arguments, own=None):
    """Processes of one run; ``own`` are the further arguments of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        start_script(f"{arguments} {more} --coordinator localhost:{port} --processes {count} --process-id {i}")
        for i, more in enumerate(own or [""] * count)
    ]


@pytest.mark.thorough
def test_two_processes_train_as_one_does_and_one_goes_on_where_they_were(text):
    arguments = f"{SMALL} --data {text} --steps 5 {CHECKPOINTS}"
    processes = [start_script(f"{arguments} --output one --checkpoint-dir ones")]
    processes += start_together(2, f"{arguments} --output two")
    said = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    one, two = ([record["loss"] for record in records(folder)] for folder in ("one", "two"))
    assert len(one) == len(two) == 5 and np.allclose(one, two, rtol=1e-6)
    assert "loss" not in said[2][0]  # only process 0 speaks
    shutil.rmtree("checkpoints/5")
    script.main([*arguments.split(), "--output", "on"])
    assert [record["loss"] for record in records("on")] == pytest.approx(one[3:], rel=1e-6)


@pytest.mark.thorough
def test_when_a_process_dies_the_other_stops_with_a_sentence_in_bounded_time(text):
    both = start_together(2, f"{SMALL} --data {text} --steps 100000 --output out {CHECKPOINTS} --heartbeat-timeout 10")
    try:
        wait_until(lambda: Path("checkpoints/3").exists() or any(p.poll() is not None for p in both))
        both[1].kill()
        died = time.monotonic()
        said = both[0].communicate(timeout=60)
        assert both[0].returncode not in (0, None) and time.monotonic() - died < 30
        assert "process 0 of 2: another process is gone" in said[1] or "process 0 of 2: ended before" in said[1]
        assert "resume from" in said[1] or "resumes from step" in said[1]
    finally:
        for process in both:
            process.kill()
            process.communicate()


def wait_until(condition, seconds=200):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
