"""The report on a run for A100s and H100s that are not there. All but the refusals need jax's GPU packages."""

import dataclasses
import json
import re

import jax
import pytest
from conftest import GPU_PACKAGES, needs_gpu_packages

import memory
from command_line.options import ModelOptions, PipelineOptions
from memory import MemoryOptions
from vocabpp_jax import compiled
from vocabpp_jax.schedules.simulation.cost import GPUS

a100, h100 = [pytest.mark.a100, needs_gpu_packages], [pytest.mark.h100, needs_gpu_packages]
SMALL = ModelOptions(model="4B", layers=4, hidden=512, heads=4, seq=1024, vocab_size=8192)


def options_for(schedule, method, m=16, model=SMALL, p=4, gpu="a100-80g", **options):
    pipeline = PipelineOptions(schedule, method, stages=p, microbatches=m, microbatch_size=1, data_parallel=1)
    layers = 2 * p if schedule.startswith("v-") and model is SMALL else model.layers
    return MemoryOptions(gpu=gpu, model=dataclasses.replace(model, layers=layers), pipeline=pipeline, **options)


def compile_for(*arguments, **options):
    return memory.report(options_for(*arguments, **options))[0]


def hidden(found):
    """The steps whose large collectives all have a transformer pass between their start and their end."""
    large = [c for c in found.collectives if c.bytes >= 2**20 and c.step != "transfer"]
    return {c.step for c in large} - {c.step for c in large if not any(name[0] in "FBW" for name in c.passes_between)}


def assert_hidden_and_not_copied(found):
    """Every collective starts where the program has it, every large one hides behind a pass, nothing is copied."""
    assert found.loop_copy_bytes == 0, found.copies
    assert not [c for c in found.collectives if compiled.starts_late(c.passes_before)]
    assert hidden(found) == {"hidden_broadcast", "grad_sum", "embed_sum", "embed_grad_broadcast"}, found.collectives


def assert_drawn_in_place(model, stages, method="vocab-2", gpu="a100-80g"):
    """Initialising takes the memory of what it leaves and of one matrix, and compiles in seconds."""
    pipeline = PipelineOptions(method=method, stages=stages, microbatches=128, microbatch_size=1, data_parallel=1)
    run = memory.programs(MemoryOptions(gpu=gpu, model=model, pipeline=pipeline))
    found = run.report("init")
    largest = max(x.size for x in jax.tree.leaves(run.pipe.model.param_shapes()["blocks"][0])) * 4
    assert found.temp_bytes <= 0.1 * found.output_bytes + largest
    assert found.peak_bytes <= 1.1 * found.output_bytes + largest
    return found


def streams_of(schedule, method, folder, gpu):
    """The communication stream of every asynchronous operation of a gradient program, as the runtime gets it."""
    run = memory.programs(options_for(schedule, method, gpu=gpu))
    program = run.pipe.jit(run.pipe.value_and_grad).lower(run._state.params, run._batch)
    program.compile({"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True})
    (thunks,) = folder.glob("*value_and_grad*.thunk_sequence.txt")
    return set(re.findall(r"stream=communication_stream\[(\d)\].*\n.*: k(\w+)", thunks.read_text()))


@pytest.mark.skipif(GPU_PACKAGES, reason="jax's GPU packages are installed")
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
        (["--plot", "memory.png", "--program", "init"], "plot belongs to the step, and program is init"),
        (["--program", "fit"], "--program"),
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
            pytest.param("1f1b", "vocab-1", 4, marks=pytest.mark.newest),
            ("1f1b", "vocab-2", 2),
            ("1f1b", "vocab-2", 4),
            pytest.param("v-half", "vocab-1", 2, marks=pytest.mark.newest),
            pytest.param("v-half", "vocab-2", 2, marks=pytest.mark.newest),
            ("v-half", "vocab-2", 3),
        ],
    )
    def test_collectives_hide_behind_transformer_passes_and_nothing_is_copied(self, schedule, method, p):
        assert_hidden_and_not_copied(compile_for(schedule, method, p=p))

    @pytest.mark.newest
    @pytest.mark.parametrize(
        ("schedule", "method", "sizes"),
        [
            ("1f1b", "vocab-2", dict(seq=512, hidden=512)),
            ("zb-h1", "vocab-1", dict(seq=512, hidden=512)),
            ("1f1b", "vocab-1", dict(seq=2048, hidden=512)),
            ("zb-h1", "vocab-2", dict(seq=512, hidden=512, vocab_size=1024)),
        ],
        ids=["s = h", "s = h, split", "s = 4h", "V/p = h = s, split"],
    )
    def test_nothing_is_copied_where_sizes_coincide(self, schedule, method, sizes):
        # Two layers a stage: one's activations are read when the other's gradients are there.
        found = compile_for(schedule, method, m=8, model=dataclasses.replace(SMALL, **sizes), p=2)
        assert found.loop_copy_bytes == 0, found.copies

    @pytest.mark.parametrize(("model", "stages"), [("4B", 8), ("21B", 32), ("30B", 32)])
    def test_initialising_takes_no_more_memory_than_it_leaves_and_a_matrix(self, model, stages):
        assert_drawn_in_place(ModelOptions(model=model, vocab_size=256_000), stages)

    @pytest.mark.parametrize("method", ["baseline", "vocab-2"])
    def test_initialising_is_as_large_for_many_layers_as_for_few(self, method):
        few, many = (dataclasses.replace(SMALL, layers=layers) for layers in (4, 64))
        few, many = (assert_drawn_in_place(model, 2, method) for model in (few, many))
        assert many.temp_bytes <= few.temp_bytes + 2**20

    @pytest.mark.newest
    def test_transfers_have_a_communication_stream_of_their_own(self, tmp_path):
        streams = streams_of("v-half", "vocab-1", tmp_path, "a100-80g")
        assert {name for stream, name in streams if stream == "1"} == {"CollectivePermute"}
        assert {name for stream, name in streams if stream == "0"} >= {"AllReduce", "CollectiveBroadcast"}
        assert ("0", "CollectivePermute") not in streams

    def test_more_microbatches_make_no_more_code(self):
        few, many = (compile_for("1f1b", "vocab-2", m).instructions for m in (128, 512))
        assert abs(many - few) <= few // 100  # what XLA fuses depends a little on the size of the batch

    @pytest.mark.parametrize(
        "flag",
        [
            "xla_gpu_experimental_collective_start_as_early_as_possible",
            "xla_gpu_experimental_parallel_collective_overlap_limit",
            "xla_gpu_collective_permute_combine_threshold_bytes",
        ],
    )
    def test_without_a_flag_collectives_start_later_than_the_program_has_them(self, flag):
        found = compile_for("v-zb", "vocab-1", without=(flag,))
        assert flag not in found.assumed["flags"]
        assert [c for c in found.collectives if compiled.starts_late(c.passes_before)]

    @pytest.mark.newest
    def test_collectives_overlap_with_passes_even_if_little_memory_is_free(self, tmp_path):
        tight, described = tmp_path / "tight.toml", (GPUS / "a100-80g.toml").read_text()
        tight.write_text(described.replace("device_memory_size = 85100068864", "device_memory_size = 200000000"))
        assert_hidden_and_not_copied(compile_for("1f1b", "vocab-2", gpu=str(tight)))
        found = compile_for("1f1b", "vocab-2", gpu=str(tight), without=("xla_gpu_memory_limit_slop_factor",))
        assert 0.8 * 2e8 < found.peak_bytes < 2e8 and not hidden(found)

    @pytest.mark.newest
    @pytest.mark.parametrize(
        ("schedule", "method"),
        [("v-zb", "vocab-1"), ("v-half", "vocab-1"), ("v-min", "baseline"), ("zb-h2", "vocab-2")],
    )
    def test_transfers_start_behind_the_pass_that_makes_them_and_hide_behind_others(self, schedule, method):
        found = compile_for(schedule, method)
        assert not [c for c in found.collectives if compiled.starts_late(c.passes_before)]
        transfers = [c for c in found.collectives if c.step == "transfer"]
        assert transfers and all(c.passes_between for c in transfers)

    def test_a_published_run_takes_a_tenth_less_memory_than_was_published(self, tmp_path, capsys):
        out, picture = tmp_path / "report.json", tmp_path / "memory.png"
        memory.main(["--program", "step", "--json", str(out), "--plot", str(picture)])  # 4B on 8, s=2048, V=32k, m=128
        found = json.loads(out.read_text())
        assert found["peak_bytes"] <= 0.9 * 14.83 * 2**30
        assert sum(found["parts"].values()) == found["peak_bytes"]
        assert found["loop_copy_bytes"] == 0 and picture.stat().st_size > 10_000
        assert "assumed" in capsys.readouterr().out

    @pytest.mark.newest
    def test_copies_gather_rounded_weights_scatter_gradients_and_keep_a_share_of_the_state(self):
        options = options_for("1f1b", "vocab-2", p=4)
        options = dataclasses.replace(options, pipeline=dataclasses.replace(options.pipeline, data_parallel=2))
        found, text = memory.report(options)
        assert_hidden_and_not_copied(found)
        whole = found.parts["gradients"]
        assert found.parts["parameters"] + found.parts["optimizer"] == pytest.approx(12 / 2 * whole / 4, rel=1e-3)
        entry = text[text.index("\nENTRY ") :]
        gathered = re.findall(r"= (.+) all-gather(?:-start)?\(.*/gather/", entry)
        scattered = sum(compiled.hlo.shape_bytes(x) for x in re.findall(r"= (.+) reduce-scatter(?:-done)?\(", entry))
        assert gathered and not any("f32" in shape for shape in gathered)
        assert scattered == whole / 2

    def test_nothing_is_copied_with_a_tail(self):
        model = dataclasses.replace(SMALL, layers=3, hidden=1024, heads=8, mtp_depth=1)
        assert_hidden_and_not_copied(compile_for("1f1b", "vocab-2", m=8, model=model, p=2))

    def test_every_program_is_reported(self, tmp_path, capsys):
        out = tmp_path / "report.json"
        arguments = "--layers 4 --hidden 512 --heads 4 --seq 1024 --vocab-size 8192 --stages 2 --microbatches 8"
        memory.main([*arguments.split(), "--json", str(out)])
        found = json.loads(out.read_text())
        assert [program["name"] for program in found["programs"]] == list(compiled.PROGRAMS)
        by_name = {program["name"]: program for program in found["programs"]}
        assert by_name["step"]["peak_bytes"] == found["peak_bytes"]
        state = by_name["init"]["output_bytes"]
        for program in found["programs"]:
            assert program.keys() == set(compiled.ProgramReport._fields) and program["compile_seconds"] > 0
            assert program["peak_bytes"] >= 0.99 * state
        assert by_name["save"]["peak_bytes"] >= state + by_name["save"]["output_bytes"]
        assert "restore" in capsys.readouterr().out


class TestH100:
    pytestmark = h100

    @pytest.mark.parametrize(("schedule", "method"), [("1f1b", "vocab-2"), ("v-half", "vocab-1")])
    def test_collectives_hide_behind_transformer_passes_and_nothing_is_copied(self, schedule, method):
        assert_hidden_and_not_copied(compile_for(schedule, method, p=2, gpu="h100-80g"))

    def test_nothing_is_copied_where_sizes_coincide(self):
        model = dataclasses.replace(SMALL, seq=512)
        found = compile_for("zb-h1", "vocab-2", m=8, model=model, p=2, gpu="h100-80g")
        assert found.loop_copy_bytes == 0, found.copies

    def test_initialising_takes_no_more_memory_than_it_leaves_and_a_matrix(self):
        assert_drawn_in_place(ModelOptions(model="21B", vocab_size=256_000), 32, gpu="h100-80g")
