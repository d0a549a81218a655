"""What the training command says of its input before anything compiles, and what of it reaches the export."""

import errno
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import FAST_COMPILE

import train as script
from vocabpp_jax import data, models
from vocabpp_jax.data import train_tokenizer
from vocabpp_jax.models import huggingface
from vocabpp_jax.runtime import hosts

REPOSITORY = Path(__file__).parent.parent
CASES = Path(__file__).parent / "cases"
SHAPE = "--stages 2 --data-parallel 1 --microbatches 1 --seq 8 --eval-batches 1 --steps 1 --warmup 0 --output out"
SMALL = f"{SHAPE} --layers 2 --hidden 16 --heads 2 --vocab-size 300"
END = "<|endoftext|>"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("VOCABPP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("alpha beta gamma delta " * 500)


@pytest.fixture
def source(tmp_path):
    """A small Llama with its tokenizer, as a Hugging Face folder."""
    config = models.named("llama-tiny", vocab_size=300, layers=2, hidden=16, heads=2, kv_heads=2, head_size=8, inner=24)
    huggingface.save("source", config, models.build(config).init(jax.random.key(1)), values={"eos_token_id": 7})
    train_tokenizer([Path("text.txt").read_text()], 300).save("source/tokenizer.json")
    Path("source/tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    Path("source/generation_config.json").write_text("{}")
    return config


def megatron(name):
    """A dataset without a suffix in its name: Megatron's own --data-path."""
    tokens = np.random.default_rng(0).integers(0, 300, 2000).astype(np.uint16)
    for suffix in ("idx", "bin"):
        shutil.copy(CASES / f"ones.{suffix}", f"{name}.{suffix}")
    lengths, documents = np.full(40, 50, np.int32), np.arange(41, dtype=np.int64)
    header = data.megatron.HEADER.pack(data.megatron.MAGIC, 1, 8, 40, 41)
    pointers = (np.arange(40) * 100).astype(np.int64)
    Path(f"{name}.idx").write_bytes(header + lengths.tobytes() + pointers.tobytes() + documents.tobytes())
    Path(f"{name}.bin").write_bytes(tokens.tobytes())


def refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(arguments.split())
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    return said


def test_a_megatron_prefix_goes_with_pretrained_weights_and_the_export_is_the_sources(source, capsys):
    megatron("set")
    script.main(f"{SHAPE} --model ./source --pretrained --data set --export after".split())
    kept = json.loads(Path("source/config.json").read_text())
    after = json.loads(Path("after/config.json").read_text())
    assert after == kept and after["max_position_embeddings"] == source.seq and after["eos_token_id"] == 7
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert Path("after", name).read_bytes() == Path("source", name).read_bytes()
    capsys.readouterr()
    assert "data is 'set', which holds tokens already; tokenizer does not go with it" in refused(
        f"{SHAPE} --model ./source --pretrained --data set --tokenizer source/tokenizer.json", capsys
    )
    assert "mtp_depth is 1 and source has no mtp.safetensors" in refused(
        f"{SHAPE} --model ./source --pretrained --data set --mtp-depth 1", capsys
    )


@pytest.mark.thorough
def test_a_model_from_scratch_is_exported_with_the_tokenizer_that_was_trained():
    script.main(f"{SMALL} --data text.txt --export after".split())
    values = json.loads(Path("after/config.json").read_text())
    assert values["eos_token_id"] == 0 and values["bos_token_id"] is None
    tokenizer = data.load_tokenizer("after/tokenizer.json")
    assert tokenizer.token_to_id(END) == 0
    assert json.loads(Path("after/tokenizer_config.json").read_text())["eos_token"] == END


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--export after --soft-cap 30", "soft_cap is 30.0, which the config.json of a GPT2LMHeadModel cannot say"),
        ("--export text.txt/after", "export is 'text.txt/after', which cannot be written"),
        ("--export text.txt", "export is 'text.txt', which already exists"),
        ("--end-of-text x", "end_of_text is 'x' without a tokenizer"),
        (f"--tokenizer {CASES}/ds.json", "there is no end-of-text token"),
        (f"--tokenizer {CASES}/trunc.json --end-of-text xyz", "end_of_text is 'xyz', which is not a token"),
        (f"--data {CASES}/dup.jsonl", "its 50 documents are one text of 14 bytes"),
        (f"--data {CASES}/ones --document-masks", "the train split has no label that counts"),
        ("--mtp-depth 1 --mtp-weight 0", "mtp_weight is 0.0; it must be above 0 and finite"),
        ("--data-parallel 256", "stages, data_parallel and tensor_parallel ask for 512 devices per process"),
        ("--microbatches 1000000000", "stages 2 times microbatches 1000000000 is 2000000000"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_compiles(arguments, sentence, capsys, monkeypatch):
    monkeypatch.setattr(script, "run_training", lambda run: pytest.fail("training began"))
    assert sentence in refused(f"{SMALL} --data text.txt {arguments}", capsys)
    assert not Path("after.partial").exists()


def test_what_one_may_not_expect_of_the_data_is_noted(capsys, monkeypatch):
    monkeypatch.setattr(script, "run_training", lambda run: None)
    Path("texts").mkdir()
    for i in range(60):
        Path(f"texts/{i}.txt").write_text(f"{i} alpha beta gamma" + END * (i == 3))
    Path("texts/README.md").write_text("about")
    script.main(f"{SMALL} --data texts".split())
    said = capsys.readouterr().out
    assert "note: read as documents in texts: README.md" in said
    assert f"note: 1 of 61 documents spell special tokens ({END}), which are read as text" in said


@pytest.mark.sampled(3)
@pytest.mark.parametrize("size", [0, 100, 3000])
def test_a_full_disk_under_the_token_cache_is_a_sentence(size, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        said = refused(f"{SMALL} --data text.txt --output out", capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot be written (File too large); make room in its folder, or set VOCABPP_CACHE to another" in said
    assert not list(Path("cache").glob("*.partial*"))
    script.main(f"{SMALL} --data text.txt".split())  # nothing half written is taken for whole


@pytest.mark.thorough
def test_a_full_disk_under_the_export_is_a_sentence_and_the_checkpoint_stays(capsys, monkeypatch):
    def full(folder, *_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{folder}.partial/model.safetensors")

    monkeypatch.setattr(huggingface, "save", full)
    with pytest.raises(SystemExit) as stop:
        script.main(f"{SMALL} --data text.txt --export after --checkpoint-dir kept".split())
    said = capsys.readouterr().err
    assert stop.value.code == 1 and said.count("\n") == 1
    assert said.startswith("error: the weights cannot be exported to after: No space left on device")
    assert Path("kept/1").is_dir() and "resumes from step 1, in" in said


def run(arguments, **environment):
    """The command from a shell, without the eight devices of this process."""
    command = [sys.executable, "-W", "error", str(REPOSITORY / "experiments/train.py"), *arguments.split()]
    return subprocess.run(
        command, env=os.environ | {"XLA_FLAGS": FAST_COMPILE} | environment, capture_output=True, text=True, timeout=300
    )


def test_a_backend_that_is_not_there_is_a_sentence():
    for platform in ("cuda", "tpu"):
        done = run(f"{SMALL} --data text.txt", JAX_PLATFORMS=platform)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith(f"error: JAX_PLATFORMS is '{platform}'; JAX cannot start a backend")


@pytest.mark.thorough
def test_settings_of_jax_change_no_number():
    losses = {}
    for name in ("JAX_ENABLE_X64", "JAX_DEFAULT_PRNG_IMPL", "PATH"):
        value = {"JAX_ENABLE_X64": "1", "JAX_DEFAULT_PRNG_IMPL": "rbg"}.get(name, os.environ["PATH"])
        shutil.rmtree("out", ignore_errors=True)
        done = run(f"{SMALL} --data text.txt --checkpoint-dir checkpoints-{name}", **{name: value})
        assert done.returncode == 0, done.stderr
        losses[name] = json.loads(Path("out/metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert losses["JAX_DEFAULT_PRNG_IMPL"] == losses["PATH"]
    assert losses["JAX_ENABLE_X64"] == pytest.approx(losses["PATH"], rel=1e-6)


def test_reports_of_gpus_that_are_not_there_are_kept_out_of_sight(monkeypatch, caplog):
    logger = logging.getLogger("jax._src.xla_bridge")
    monkeypatch.setattr(logger, "filters", [])

    def report():
        caplog.clear()
        logger.error("Jax plugin configuration error: Exception when calling %s.initialize()", "jax_plugins.xla_cuda12")
        logger.error("another error")
        return [record.getMessage()[:9] for record in caplog.records]

    monkeypatch.setattr(Path, "glob", lambda path, pattern: [path] if pattern.startswith("nvidia") else [])
    hosts.quiet_plugins()
    assert report() == ["Jax plugi", "another e"]  # where there is a GPU, it matters
    monkeypatch.setattr(Path, "glob", lambda path, pattern: [])
    hosts.quiet_plugins()
    hosts.quiet_plugins()
    assert report() == ["another e"] and len(logger.filters) == 1
