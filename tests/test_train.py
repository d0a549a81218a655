"""The main job, made small: it trains, writes what it promises, refuses what cannot be, and runs on two processes."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import train as script
from conftest import FAST_COMPILE

from vocabpp_jax.data import train_tokenizer

REPOSITORY = Path(__file__).parent.parent
SMALL = "--vocab-size 300 --layers 2 --hidden 32 --heads 2 --seq 16 --stages 2 --data-parallel 1 --microbatches 3"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VOCABPP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


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


def test_the_other_options_train_too(text):
    options = f"{SMALL} --data {text} --steps 2 --output out --method baseline --dtype bfloat16 --tie-embeddings"
    script.main([*options.split(), "--data-parallel", "2", "--eval-batches", "1"])
    assert len(records("out")) == 2 and records("out")[0]["loss"] == pytest.approx(np.log(300), abs=0.3)


def test_without_data_parallel_all_devices_are_used(monkeypatch):
    monkeypatch.setattr(script, "load_tokens", lambda *_, **__: pytest.fail("reads data too early"))
    assert jax.device_count() == 8
    assert script.PipelineOptions(stages=2).mesh().shape == {"data": 4, "pipe": 2}


@pytest.mark.parametrize(
    "options, sentence",
    [
        ("--stages 3", "stages is 3; it must divide the devices, of which there are 8"),
        ("--stages 0", "stages is 0"),
        ("--stages 2 --data-parallel 3", "data-parallel 3"),
        ("--stages four", "--stages: invalid literal for int() with base 10: 'four'"),
        ("--layers 1", "layers is 1"),
        ("--heads 3", "heads is 3; it must divide hidden, which is 32"),
        ("--hidden 0", "hidden is 0"),
        ("--schedule 2f2b", "schedule is '2f2b'; the schedules are"),
        ("--method vocab-3", "method is 'vocab-3'"),
        ("--model 5B", "'5B'; it must be one of gpt-tiny"),
        ("--dtype float16", "dtype is 'float16'; it must be one of float32, bfloat16"),
        ("--microbatches 0", "microbatches is 0"),
        ("--steps 0", "steps is 0"),
        ("--lr 0", "lr is 0.0"),
        ("--warmup 99999", "warmup is 99999"),
        ("--seed -1", "seed is -1"),
        ("--clip -1", "clip is -1.0"),
        ("--coordinator localhost:1", "coordinator, processes and process_id are given together"),
        ("--distributed", "neither SLURM nor Open MPI"),
        ("--vocab-size 200", "vocab_size is 200; byte-level BPE needs at least 257"),
        ("--seq 100000", "too few for"),
        ("--microbatch-size 100000", "too few for one batch of 300000 sequences of 16"),
        ("--data nowhere.txt", "data is 'nowhere.txt', no file or folder"),
        ("--data empty.txt", "data is 'empty.txt', which holds no text"),
        ("--data binary.txt", "binary.txt is not text"),
        ("--data bad.jsonl", "bad.jsonl:2 has no field 'text'"),
        ("--tokenizer nothing.json", "tokenizer is 'nothing.json', which is not a file"),
        ("--tokenizer large.json", "outside a vocabulary of 300"),
        ("--output taken", "output is 'taken', which holds a run already"),
        ("--output empty.txt/out", "output is 'empty.txt/out', which cannot be written"),
        ("--nonsense", "Unrecognized options: --nonsense"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence_before_anything_compiles(
    options, sentence, text, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(script, "run_training", lambda run: pytest.fail("training began"))
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(b"\x00\x01")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"txt": "not"}\n')
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/metrics.jsonl").touch()
    train_tokenizer([Path(text).read_text()], 400).save(str(tmp_path / "large.json"))
    with pytest.raises(SystemExit) as stop:
        script.main([*SMALL.split(), "--data", text, *options.split()])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("error: ") and sentence in said and said.count("\n") == 1
    assert not (tmp_path / "runs").exists() and not (tmp_path / "taken/config.json").exists()


def start(*arguments):
    """Start Python by itself, as from a shell, without the eight devices of this process."""
    environment = dict(os.environ, XLA_FLAGS=FAST_COMPILE)
    command = [sys.executable, "-W", "error", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def start_script(arguments):
    return start(str(REPOSITORY / "experiments/train.py"), *arguments.split())


def test_two_processes_train_as_one_does(text):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    arguments = f"{SMALL} --data {text} --steps 4 --eval-batches 1"
    both = f"{arguments} --output two --coordinator localhost:{port} --processes 2 --process-id"
    processes = [start_script(f"{arguments} --output one"), start_script(f"{both} 0"), start_script(f"{both} 1")]
    said = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    one, two = ([record["loss"] for record in records(folder)] for folder in ("one", "two"))
    assert len(one) == len(two) == 4 and np.allclose(one, two, rtol=1e-6)
    assert "loss" not in said[2][0]  # only process 0 speaks


def test_help_names_every_option():
    said, _ = start_script("--help").communicate(timeout=120)
    names = "data output model layers hidden heads seq vocab-size tie-embeddings dtype schedule method stages"
    names += " data-parallel microbatches microbatch-size steps lr warmup seed eval-every distributed coordinator"
    assert all(re.search(rf"--{name}\b", said) for name in names.split())
