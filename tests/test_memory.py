"""The report on a train step for A100s that are not there. All but the refusals need jax's GPU packages."""

import dataclasses
import importlib.util
import json

import pytest

import memory
from command_line.options import ModelOptions, PipelineOptions
from memory import MemoryOptions

HERE = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
a100 = [pytest.mark.a100, pytest.mark.skipif(not HERE, reason="jax's GPU packages are not installed")]
SMALL = ModelOptions(model="4B", layers=4, hidden=512, heads=4, seq=1024, vocab_size=8192)


def compile_for(schedule, method, m=16, model=SMALL, p=4):
    pipeline = PipelineOptions(schedule, method, stages=p, microbatches=m, microbatch_size=1, data_parallel=1)
    layers = 2 * p if schedule.startswith("v-") and model is SMALL else model.layers
    return memory.report(MemoryOptions(model=dataclasses.replace(model, layers=layers), pipeline=pipeline))[0]


@pytest.mark.skipif(HERE, reason="jax's GPU packages are installed")
def test_without_the_gpu_packages_one_sentence_names_the_extra(capsys):
    with pytest.raises(SystemExit) as stop:
        memory.main(["--layers", "8"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "vocabpp-jax[cuda12]" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "tpu"], "gpu is 'tpu'"),
        (["--plot", "memory.doc"], "plot is memory.doc"),
        (["--schedule", "v-half", "--method", "redis"], "method is 'redis'"),
        (["--model", "5B"], "5B"),
        (["--data-parallel", "0"], "data_parallel is 0"),
        (["--tensor-parallel", "2"], "tensor_parallel is 2"),
        (["--stages", "12", "--layers", "12"], "stages times data_parallel is 12"),
    ],
)
def test_what_cannot_be_compiled_is_refused_in_a_sentence(arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        memory.main(arguments)
    assert stop.value.code == 2 and said in capsys.readouterr().err


class TestA100:
    pytestmark = a100

    @pytest.mark.parametrize(
        ("schedule", "method", "p"),
        [
            ("1f1b", "vocab-1", 4),
            ("1f1b", "vocab-2", 2),
            ("1f1b", "vocab-2", 4),
            ("v-half", "vocab-1", 2),
            ("v-half", "vocab-2", 2),
        ],
    )
    def test_collectives_hide_behind_transformer_passes_and_nothing_is_copied(self, schedule, method, p):
        found = compile_for(schedule, method, p=p)
        assert found.loop_copy_bytes == 0, found.copies
        large = [c for c in found.collectives if c.bytes >= 2**20 and c.step != "transfer"]
        assert {c.step for c in large} == {"C0", "big", "CI", "CB"}
        for collective in large:
            assert any(name[0] in "FBW" for name in collective.passes_between), collective

    def test_more_microbatches_make_no_more_code(self):
        assert len({compile_for("1f1b", "vocab-2", m).instructions for m in (128, 512)}) == 1

    def test_a_flag_left_out_shows_in_the_report(self):
        options = MemoryOptions(model=SMALL, without=("xla_gpu_enable_latency_hiding_scheduler",))
        pipeline = PipelineOptions(stages=4, microbatches=16, microbatch_size=1, data_parallel=1)
        found, _ = memory.report(dataclasses.replace(options, pipeline=pipeline))
        assert not any(c.passes_between for c in found.collectives if c.step == "big")

    def test_a_published_run_takes_a_tenth_less_memory_than_was_published(self, tmp_path, capsys):
        out, picture = tmp_path / "report.json", tmp_path / "memory.png"
        memory.main(["--json", str(out), "--plot", str(picture)])  # 4B on 8 GPUs, s=2048, V=32k, m=128
        found = json.loads(out.read_text())
        assert found["peak_bytes"] <= 0.9 * 14.83 * 2**30
        assert sum(found["parts"].values()) == found["peak_bytes"]
        assert found["loop_copy_bytes"] == 0 and picture.stat().st_size > 10_000
        assert "assumed" in capsys.readouterr().out
