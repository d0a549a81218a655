"""The options of the training command: the help names them all; what cannot be is refused before anything compiles."""

# ruff: noqa: F811 (a test takes the imported fixture `text`)

import contextlib
import io
import re
from pathlib import Path

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import SMALL, cache, start_script, text  # noqa: F401

import train as script
from command_line.options import ModelOptions
from training_run import train_prepare
from training_run.train_options import CheckpointOptions, check_output
from vocabpp_jax import models
from vocabpp_jax.data import train_tokenizer


def test_a_named_model_is_that_one_beside_a_folder_that_is_called_so(tmp_path):
    (tmp_path / "gpt-tiny").mkdir()
    assert ModelOptions("gpt-tiny").config() == models.named("gpt-tiny")


def test_without_data_parallel_all_devices_are_used(monkeypatch):
    monkeypatch.setattr(train_prepare, "load_tokens", lambda *_, **__: pytest.fail("reads data too early"))
    assert jax.device_count() == 8
    assert script.PipelineOptions(stages=2).mesh().shape == {"data": 4, "pipe": 2}


@pytest.mark.parametrize(
    "options, sentence",
    [
        ("--stages 3", "stages is 3; it must divide the devices, of which there are 8"),
        ("--stages 0", "stages is 0"),
        ("--stages 2 --data-parallel 3", "data_parallel is 3; it must divide the 4 copies"),
        ("--stages 2 --data-parallel 0", "data_parallel is 0"),
        ("--stages four", "--stages: invalid literal for int() with base 10: 'four'"),
        ("--layers 1", "layers is 1"),
        ("--heads 3", "heads is 3; it must divide hidden, which is 32"),
        ("--hidden 0", "hidden is 0"),
        ("--schedule 2f2b", "schedule is '2f2b'; the schedules are"),
        ("--method vocab-3", "method is 'vocab-3'"),
        ("--pretrained", "pretrained is set and model is 'gpt-micro'"),
        ("--export .", "export is '.', which already exists"),
        ("--model ./none", "none has no config.json"),
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
        ("--data nowhere.txt", "data is 'nowhere.txt', which is not a file or folder"),
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


SPELLINGS = st.sampled_from(["--steps", "--checkpoint-dir", "--data", "--lr", "--model", "--tensorboard", "--step"])


@settings(max_examples=20)
@given(st.lists(st.one_of(SPELLINGS, st.text(st.characters(exclude_categories=["Cs"]), max_size=8)), max_size=5))
def test_any_command_line_is_understood_or_refused_in_a_sentence(arguments):
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            script.parse(script.TrainOptions, "", arguments)
    except SystemExit as stop:  # 0 for --help
        assert stop.code == 0 or (stop.code == 2 and said.getvalue().startswith("error: "))


@given(raw=st.one_of(st.binary(max_size=60), st.recursive(st.none() | st.text(), st.lists).map(repr).map(str.encode)))
def test_any_bytes_as_an_earlier_configuration_are_refused_and_left_alone(raw, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "any-config"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(raw)
    options = script.TrainOptions(checkpoint=CheckpointOptions(checkpoint_dir=str(folder)))
    with pytest.raises(ValueError, match="whose config.json cannot be read"):
        check_output(folder, options, {"lr": 1})
    assert (folder / "config.json").read_bytes() == raw


def test_help_names_every_option():
    said, _ = start_script("--help").communicate(timeout=120)
    names = "data output model layers hidden heads seq vocab-size tie-embeddings dtype schedule method stages"
    names += " data-parallel microbatches microbatch-size steps lr warmup seed eval-every distributed coordinator"
    names += " checkpoint-dir checkpoint-every accept-changes max-skipped document-masks profile tensorboard"
    assert all(re.search(rf"--{name}\b", said) for name in names.split())
