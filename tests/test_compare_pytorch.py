import json

import numpy as np
import pytest

import compare_pytorch
from pytorch.compare_report import ALONE, ratios_of
from pytorch.megatron_logs import read_log
from speed_measure import exchange

ARGUMENTS = """------------------------ arguments ------------------------
  padded_vocab_size ............................... 32768
  seq_length ...................................... 2048
"""
ITERATION = (
    " [2024-10-01 10:00:0{n}] iteration {n:8d}/      10 | consumed samples:          256 | "
    "elapsed time per iteration (ms): {ms} | {more}learning rate: 1.0E-04 | global batch size:   128 | "
    "lm loss: {loss:.6E} | loss scale: 1.0 |\n"
)
MEMORY = "[Rank {rank}] (after 2 iterations) memory (MB) | allocated: 1.5 | max allocated: {mb} | reserved: 9.0 |\n"


def write(path, throughput="throughput per GPU (TFLOP/s/GPU): 150.5 | "):
    times = (9000.0, 4000.0, 2000.0, 2100.0, 2200.0)
    lines = [ITERATION.format(n=n, ms=ms, loss=10 - n, more=throughput) for n, ms in enumerate(times, 1)]
    memory = [MEMORY.format(rank=r, mb=mb) for r, mb in ((0, 20480.0), (1, 10240.0))]
    path.write_text(ARGUMENTS + "".join(lines[:2] + memory + lines[2:]))
    return path


def test_a_megatron_log_tells_time_throughput_and_memory(tmp_path):
    run = read_log(write(tmp_path / "run.log"))
    assert (run.step_ms, run.tflops, run.memory_gib) == (2100.0, 150.5, 20.0)
    assert run.tokens == 128 * 2048 and run.vocab_size == 32768
    assert run.tokens_per_second == pytest.approx(128 * 2048 / 2.1)
    assert run.losses[1] == 9.0 and len(run.losses) == 5


def test_what_a_log_does_not_say_is_none(tmp_path):
    path = write(tmp_path / "old.log", throughput="")
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "iteration" in line.split("|")[0]))
    run = read_log(path)
    assert run.step_ms == 2100.0 and (run.tflops, run.tokens, run.tokens_per_second) == (None, None, None)


def test_logs_go_into_the_same_table(tmp_path, capsys):
    compare_pytorch.main(["--what", "logs", "--logs", str(write(tmp_path / "run.log")), "--json", "-"])
    said = capsys.readouterr()
    assert json.loads(said.out)["logs"][0]["step_ms"] == 2100.0
    assert "| 32,768 | Megatron | run | 124,830 | 2100 | 150.5 | 20.0 |" in said.err


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--what", "logs", "--logs", "nowhere.log"], "no such file"),
        (["--ours", "vocab-2"], "write schedule and method"),
        (["--tie-embeddings"], "tie_embeddings is set"),
        (["--dtype", "bfloat16"], "in float32"),
        (["--steps", "0"], "steps is 0"),
        (["--label-smoothing", "0.1"], "label_smoothing=0.1"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_sentence(arguments, names, capsys):
    with pytest.raises(SystemExit, match="2"):
        compare_pytorch.main(arguments)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and names in said


def test_a_log_without_times_is_refused(tmp_path):
    (tmp_path / "x.log").write_text("nothing\n")
    with pytest.raises(ValueError, match="no line has"):
        read_log(tmp_path / "x.log")


def test_weights_and_batches_come_back_as_they_were(tmp_path):
    weights = {"blocks.0.attention.qkv.kernel": np.arange(6.0).reshape(2, 3)}
    batches = exchange.make_batches(steps=3, m=2, batch=1, seq=50, vocab_size=11)
    exchange.write(tmp_path, weights, batches)
    assert np.array_equal(exchange.read_weights(tmp_path)["blocks.0.attention.qkv.kernel"], weights.popitem()[1])
    steps = list(exchange.read_batches(tmp_path))
    assert len(steps) == 3 and steps[0]["tokens"].shape == (2, 1, 50)
    assert np.array_equal(steps[2]["tokens"][..., 1:], steps[2]["labels"][..., :-1])
    # A token is followed by the same one far more often than by chance.
    pairs = np.stack([batches["tokens"].ravel(), batches["labels"].ravel()])
    commonest = [np.bincount(pairs[1][pairs[0] == t], minlength=11).max() for t in range(11)]
    assert sum(commonest) / pairs.shape[1] > 0.6


def test_kernels_and_schedule_explain_the_measured_ratio():
    options = compare_pytorch.CompareOptions()
    seconds = {f"ours {ALONE}": 10.0, f"torch {ALONE}": 15.0, "torch 1f1b": 33.0}
    seconds |= {"ours 1f1b baseline": 20.0, "ours 1f1b vocab-2": 12.0}
    # A round in which the machine is half as fast changes nothing.
    seconds = {name: [once, 2 * once, once] for name, once in seconds.items()}
    ratio = next(r for r in ratios_of(options.ours, 100, seconds) if r["ours"] == "1f1b vocab-2")
    assert ratio["kernel_ratio"] == 1.5 and ratio["schedule_ratio"] == pytest.approx(20 / 12)
    assert ratio["product"] == pytest.approx(2.5) and ratio["measured_ratio"] == pytest.approx(2.75)


@pytest.mark.torch
def test_pytorch_s_pipelines_train_to_the_same_losses(tmp_path):
    pytest.importorskip("torch", reason="the extra torch is not installed")
    small = "--layers 4 --hidden 16 --heads 2 --seq 8 --vocab-size 37 --microbatches 4 --share-cores".split()
    command = [*small, "--what", "losses", "--steps", "6", "--ours", "1f1b vocab-2", "--schedules", "1f1b", "v-zb"]
    compare_pytorch.main([*command, "--json", str(tmp_path / "x.json")])
    found = json.loads((tmp_path / "x.json").read_text())
    losses = found["losses"]["ours 1f1b vocab-2"]
    assert losses[-1] < losses[0] and found["holds"]
    assert set(found["losses"]) == {"ours 1f1b vocab-2", "torch 1f1b", "torch v-zb"}
    assert max(found["largest_difference"].values()) < 1e-5


@pytest.mark.torch
def test_throughput_is_told_with_what_it_is_made_of(tmp_path):
    pytest.importorskip("torch", reason="the extra torch is not installed")
    small = "--layers 4 --hidden 16 --heads 2 --seq 8 --vocab-sizes 37 --microbatches 4 --share-cores".split()
    compare_pytorch.main([*small, "--what", "speed", "--repeats", "1", "--json", str(tmp_path / "x.json")])
    found = json.loads((tmp_path / "x.json").read_text())
    ms = {f"{row['framework']} {row['what']}": row["measured_ms"] for row in found["rows"]}
    assert set(ms) == {f"ours {ALONE}", f"torch {ALONE}", "ours 1f1b vocab-2", "ours 1f1b baseline", "torch 1f1b"}
    for ratio in found["ratios"]:
        assert ratio["kernel_ratio"] == pytest.approx(ms[f"torch {ALONE}"] / ms[f"ours {ALONE}"])
        assert ratio["measured_ratio"] == pytest.approx(ms["torch 1f1b"] / ms[f"ours {ratio['ours']}"])
