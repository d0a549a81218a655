"""An export keeps what training did not change, says what transformers of either form reads, and is refused in time."""

import dataclasses
import json
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_weights import CONFIGS, assert_same_bits, weights

from vocabpp_jax import Pipeline, make_mesh, models, schedules
from vocabpp_jax.models import hf_export, huggingface

LONGER = CONFIGS["llama-3.1"]
COMPANIONS = {
    "generation_config.json": '{"temperature": 0.6}',
    "tokenizer.json": '{"model": {}}',
    "tokenizer_config.json": '{"eos_token": "<|eot|>"}',
    "special_tokens_map.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "LICENSE.txt": "terms",
}


def values_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture
def source(tmp_path):
    """A folder as transformers 4 writes it, with fields and files that are nothing to us."""
    folder = tmp_path / "source"
    huggingface.save(folder, LONGER, weights(LONGER))
    values = values_of(folder)
    del values["rope_parameters"], values["dtype"]
    values |= {"max_position_embeddings": 131072, "bos_token_id": 128000, "eos_token_id": [128001, 128008]}
    values |= {"pad_token_id": 128004, "attention_dropout": 0.0, "torch_dtype": "bfloat16", "pretraining_tp": 1}
    (folder / "config.json").write_text(json.dumps(values))
    for name, text in {**COMPANIONS, "README.md": "a card", "optimizer.pt": "x"}.items():
        (folder / name).write_text(text)
    return folder


def test_a_scaled_rope_is_written_for_readers_from_before_and_after_version_5(tmp_path):
    huggingface.save(tmp_path / "out", LONGER, weights(LONGER))
    values, scaling = values_of(tmp_path / "out"), LONGER.rope_scaling
    stretched = {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_seq,
    }
    assert values["rope_scaling"] == stretched and values["rope_theta"] == LONGER.rope_theta
    assert values["rope_parameters"] == stretched | {"rope_theta": LONGER.rope_theta}
    assert values["torch_dtype"] == values["dtype"] == "float32"
    huggingface.save(tmp_path / "plain", CONFIGS["llama"], weights(CONFIGS["llama"]))
    assert values_of(tmp_path / "plain")["rope_scaling"] is None


@pytest.mark.parametrize("form", ["rope_parameters", "rope_scaling"])
def test_either_form_of_a_scaled_rope_is_read(source, form):
    values = values_of(source)
    if form == "rope_parameters":
        values["rope_parameters"] = values.pop("rope_scaling") | {"rope_theta": values.pop("rope_theta")}
    (source / "config.json").write_text(json.dumps(values))
    config = huggingface.load_config(source)
    assert (config.rope_scaling, config.rope_theta) == (LONGER.rope_scaling, LONGER.rope_theta)


def test_what_training_did_not_change_is_as_in_the_source(source, tmp_path):
    config = dataclasses.replace(huggingface.load_config(source), seq=8)
    huggingface.save(tmp_path / "out", config, weights(LONGER, seed=1), source=source)
    before, after = values_of(source), values_of(tmp_path / "out")
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"dtype", "torch_dtype", "rope_parameters"} and not set(before) - set(after)
    assert after["max_position_embeddings"] == 131072 and after["eos_token_id"] == [128001, 128008]
    for name, text in COMPANIONS.items():
        assert (tmp_path / "out" / name).read_text() == text
    assert sorted(os.listdir(tmp_path / "out")) == sorted([*COMPANIONS, "config.json", "model.safetensors"])
    assert_same_bits(huggingface.load_canonical(tmp_path / "out")[1], weights(LONGER, seed=1))


def test_what_training_did_change_is_as_trained(source, tmp_path):
    config = dataclasses.replace(huggingface.load_config(source), seq=200_000, tie_embeddings=False)
    huggingface.save(tmp_path / "out", config, weights(config), source=source, tokenizer={"tokenizer.json": b"{}"})
    after = values_of(tmp_path / "out")
    assert after["max_position_embeddings"] == 200_000 and after["tie_word_embeddings"] is False
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "out" / "special_tokens_map.json").exists()  # the other tokenizer's
    assert (tmp_path / "out" / "generation_config.json").exists()


def test_without_a_source_no_published_models_tokens_are_claimed(tmp_path):
    huggingface.save(tmp_path / "out", CONFIGS["gpt2"], weights(CONFIGS["gpt2"]), values={"eos_token_id": 5})
    after = values_of(tmp_path / "out")
    assert after["bos_token_id"] is None and after["pad_token_id"] is None and after["eos_token_id"] == 5


def capped(name, cap):
    config, model = CONFIGS[name], models.build(CONFIGS[name])
    model = dataclasses.replace(model, loss=dataclasses.replace(model.loss, soft_cap=cap))
    return config, Pipeline(model, schedules.build("1f1b", "vocab-2", p=2, m=2), make_mesh(2, 1, jax.devices()[:2]))


@pytest.mark.parametrize("cap", [12.5, None])
def test_a_soft_cap_is_exported_where_it_can_be_said(tmp_path, cap):
    config, pipe = capped("gemma2", cap)
    params = weights(config)
    huggingface.save(tmp_path / "out", config, pipe.shard(params), pipe)
    assert values_of(tmp_path / "out")["final_logit_softcapping"] == cap
    assert huggingface.load_config(tmp_path / "out").loss.soft_cap == cap


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_a_soft_cap_that_cannot_be_said_is_refused_before_training(tmp_path, name):
    config, pipe = capped(name, 30.0)
    with pytest.raises(ValueError, match=r"soft_cap is 30\.0, which the config\.json of a \w+ cannot say"):
        huggingface.check_save(tmp_path / "out", config, pipe)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_refused_before_training_and_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file/out', which cannot be written"):
        huggingface.check_save(tmp_path / "file" / "out", CONFIGS["llama"])
    with pytest.raises(ValueError, match="file', which already exists"):
        huggingface.check_save(tmp_path / "file", CONFIGS["llama"])
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=5))
    with pytest.raises(ValueError, match=r"takes .* GB; its disk has 5e-09 GB free"):
        huggingface.check_save(tmp_path / "out", CONFIGS["llama"])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_remains_of_ones_own_export_are_cleared_and_others_are_not(tmp_path):
    out = tmp_path / "out"
    config, params = CONFIGS["llama"], weights(CONFIGS["llama"])
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); import test_weights as t; from pathlib import Path;"
        "from vocabpp_jax.models import hf_export;"
        "hf_export._Plan.finish = lambda plan: os._exit(9);"
        "hf_export.save(Path(sys.argv[2]), t.CONFIGS['llama'], t.weights(t.CONFIGS['llama']))"
    )
    killed = subprocess.run([sys.executable, "-c", code, os.path.dirname(__file__), str(out)], timeout=120)
    assert killed.returncode == 9 and (tmp_path / "out.partial" / "model.safetensors").exists() and not out.exists()
    huggingface.check_save(out, config)
    assert not (tmp_path / "out.partial").exists()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").touch()
    with pytest.raises(ValueError, match=r"out\.partial exists and was not left by an export; remove it"):
        huggingface.save(out, config, params)
    assert (tmp_path / "out.partial" / "mine").exists()


@contextmanager
def files_of_at_most(size):
    """Like a full disk: writing fails beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_an_error_of_the_system_and_leaves_nothing(tmp_path):
    with files_of_at_most(1000), pytest.raises(OSError) as problem:
        huggingface.save(tmp_path / "out", CONFIGS["llama"], weights(CONFIGS["llama"]))
    assert problem.value.strerror == "File too large" and "model.safetensors" in problem.value.filename
    assert not list(tmp_path.iterdir())


def test_weights_are_not_lost_where_something_takes_the_name_meanwhile(tmp_path, monkeypatch):
    out, params = tmp_path / "out", weights(CONFIGS["llama"])
    write = hf_export.write

    def slow(*arguments, **options):
        write(*arguments, **options)
        out.mkdir()

    monkeypatch.setattr(hf_export, "write", slow)
    with pytest.raises(OSError, match=r"File exists; the weights are complete in .*out\.partial"):
        huggingface.save(out, CONFIGS["llama"], params)
    assert_same_bits(huggingface.load_canonical(tmp_path / "out.partial")[1], params)
    with pytest.raises(ValueError, match="was not left by an export"):  # nor is it cleared by the next
        out.rmdir()
        huggingface.check_save(out, CONFIGS["llama"])


def test_the_files_of_a_tokenizer_are_those_beside_it(source, tmp_path):
    (source / "tokenizer.json").rename(source / "other.json")
    files = huggingface.tokenizer_files(source / "other.json")
    assert files["tokenizer.json"] == b'{"model": {}}' and "chat_template.jinja" in files
    assert "generation_config.json" not in files and np.all([isinstance(raw, bytes) for raw in files.values()])


def test_weights_beyond_float16_are_refused_rather_than_made_infinite(tmp_path):
    params = weights(CONFIGS["llama"])
    params["head"][3, 4] = 1e5
    with pytest.raises(ValueError, match=r"tensor 'lm_head\.weight' has weights of up to 1e\+05, beyond float16"):
        huggingface.save(tmp_path / "out", CONFIGS["llama"], params, dtype="float16")
    assert not list(tmp_path.iterdir())
