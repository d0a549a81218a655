"""Reading compiled programs, and what is said of a train step's memory."""

from pathlib import Path

import jax
import numpy as np
import pytest

from vocabpp_jax import Pipeline, compiled, make_mesh, models, schedules, train
from vocabpp_jax.compiled.hlo import shape_bytes
from vocabpp_jax.compiled.usage import used_parameters
from vocabpp_jax.pipeline import flags
from vocabpp_jax.pipeline.flags import FLAGS, compiler_options
from vocabpp_jax.schedules.simulation.cost import GPUS, load_gpu
from vocabpp_jax.training.optimizer import adamw

PROGRAM = """HloModule jit_step, is_scheduled=true

%fused (p: bf16[1024,1024]) -> bf16[1024,1024] {
  %p = bf16[1024,1024]{1,0} parameter(0)
  ROOT %copy.7 = bf16[1024,1024]{0,1} copy(%p)
}

%pass (q: (pred[], bf16[1024,1024])) -> (pred[], bf16[1024,1024]) {
  %q = (pred[], bf16[1024,1024]{1,0}) parameter(0)
  %x = bf16[1024,1024]{1,0} get-tuple-element(%q), index=1
  %y = bf16[1024,1024]{1,0} fusion(%x), kind=kLoop, calls=%fused
  ROOT %t = (pred[], bf16[1024,1024]{1,0}) tuple(%x, %y)
}

%interval (r: (s32[], bf16[1024,1024])) -> (s32[], bf16[1024,1024]) {
  %r = (s32[], bf16[1024,1024]{1,0}) parameter(0)
  %a = bf16[1024,1024]{1,0} get-tuple-element(%r), index=1
  %s = ((bf16[1024,1024]{1,0}), bf16[1024,1024]{1,0}) collective-broadcast-start(%a), metadata={op_name="jit(step)/hidden_broadcast/pbroadcast"}
  %f = (pred[], bf16[1024,1024]{1,0}) while(%a), condition=%c, body=%pass, metadata={op_name="jit(step)/F0/while"}
  %d = bf16[1024,1024]{1,0} collective-broadcast-done(%s), metadata={op_name="jit(step)/hidden_broadcast/pbroadcast"}
  %n = f32[8]{0} all-reduce(%d), metadata={op_name="jit(step)/stats/psum"}
  %e = bf16[1024,1024]{1,0} bitcast(%a)
  %h = bf16[1024,1024]{1,0} fusion(%a, %e), kind=kLoop, calls=%fused
  %l = (bf16[1024,1024]{1,0}, bf16[1024,1024]{1,0}) collective-permute-start(%h), metadata={op_name="jit(step)/transfer/ppermute"}
  %m = bf16[1024,1024]{1,0} collective-permute-done(%l), metadata={op_name="jit(step)/transfer/ppermute"}
  %small = f32[8]{0} copy(%n)
  ROOT %o = (s32[], bf16[1024,1024]{1,0}) tuple(%i, %d)
}

ENTRY %main (z: bf16[1024,1024]) -> bf16[1024,1024] {
  %z = bf16[1024,1024]{1,0} parameter(0)
  %large = bf16[1024,1024]{1,0} copy(%z)
  ROOT %w = (s32[], bf16[1024,1024]{1,0}) while(%large), condition=%k, body=%interval, backend_config={"known_trip_count":{"n":"12"}}
}
"""  # noqa: E501


def test_a_loops_copies_are_those_of_all_it_calls_and_of_nothing_else():
    (loop,) = compiled.loops(PROGRAM)
    assert loop.trips == 12
    assert [(c.computation, c.bytes) for c in loop.copies(2**20)] == [("fused", 2 * 2**20)]
    assert len(loop.copies(1)) == 2


def test_passes_before_and_between_a_collectives_ends_are_named_and_a_synchronous_one_has_none():
    (loop,) = compiled.loops(PROGRAM)
    assert loop.collectives == [
        compiled.Collective("collective-broadcast", "hidden_broadcast", 2 * 2**20, (), ("F0",)),
        compiled.Collective("all-reduce", "stats", 32, (), ()),
        compiled.Collective("collective-permute", "transfer", 2 * 2**20, ("F0",), ()),
    ]


def test_a_collective_is_late_behind_a_pass_and_not_behind_a_loop_that_fills_a_send_buffer():
    assert not compiled.starts_late(()) and not compiled.starts_late(("embed_grad_broadcast",))
    assert compiled.starts_late(("hidden_broadcast", "S"))


def test_instructions_are_counted_over_all_computations():
    assert compiled.instruction_count(PROGRAM) == 2 + 4 + 12 + 3


@pytest.mark.parametrize(
    ("shape", "size"), [("bf16[8,128]{1,0}", 2048), ("(f32[2]{0}, s32[])", 12), ("pred[]", 1), ("f8e4m3fn[16]", 16)]
)
def test_bytes_of_shapes(shape, size):
    assert shape_bytes(shape) == size


@pytest.fixture(scope="module")
def small():
    built = schedules.build("1f1b", "vocab-2", p=2, m=4)
    config = models.named("gpt-tiny", layers=2, hidden=32, heads=2, seq=16, vocab_size=97)
    return Pipeline(models.build(config), built, make_mesh(2, devices=jax.devices()[:2]))


def test_state_and_tokens_are_the_compiled_steps_arguments(small):
    optimizer = adamw(1e-3, 10, 1)
    program, seconds = compiled.Programs(small, optimizer, microbatch_size=2, length=16).compile_step()
    state = compiled.state_bytes(small, optimizer)
    tokens = 2 * 4 * 2 * 16 * 4
    counters = 2 * 4  # steps done, steps skipped
    assert program.memory_analysis().argument_size_in_bytes == state.parameters + state.optimizer + tokens + counters
    assert state.gradients == state.parameters and seconds > 0
    assert compiled.loops(program.as_text())[0].trips >= small.schedule.m


@pytest.mark.parametrize(("method", "only_read"), [("vocab-2", True), ("baseline", False)])
def test_an_embedding_that_is_no_head_has_no_copy_in_the_compute_dtype(small, method, only_read):
    schedule = schedules.build("1f1b", method, p=2, m=4)
    pipe = Pipeline(small.model, schedule, small.mesh, compute_dtype="bfloat16")
    state = compiled.state_bytes(pipe, adamw(1e-3, 10, 1))
    embedding = sum(4 * table.size for table in jax.tree.leaves(pipe.layout.shapes()["embed"])) // schedule.p
    assert state.rounded == (state.parameters - only_read * embedding) // 2
    assert compiled.state_bytes(small, adamw(1e-3, 10, 1)).rounded == 0


def test_buffers_are_those_of_the_schedules_rings(small):
    buffers, rings = small.buffer_bytes(2, 16), small.program.rings
    a_microbatch = small.activation_bytes(2, 16)
    assert buffers["residual"] == rings["residual"] * a_microbatch["residual"]
    assert buffers["inbox"] == rings["inbox"] * 2 * 16 * 32 * 4


@pytest.mark.parametrize(("method", "even"), [("vocab-2", True), ("baseline", False)])
def test_only_a_sharded_vocabulary_is_used_evenly(method, even):
    built = schedules.build("1f1b", method, p=4, m=4)
    config = models.named("gpt-tiny", layers=4, hidden=32, heads=2, seq=16, vocab_size=128)
    pipe = Pipeline(models.build(config), built, make_mesh(4, devices=jax.devices()[:4]))
    used = np.array(used_parameters(pipe))
    assert (len(set(used.tolist())) == 1) is even
    if not even:  # the ends hold a table each, the middle holds layers only
        assert used[1] == used[2] == used[0] - (128 + 16) * 32 == used[3] - 128 * 32


def test_flags_are_given_to_gpus_alone(small):
    assert compiler_options(small.mesh) == {}
    page = (Path(__file__).parent.parent / "docs" / "memory.md").read_text()
    assert all(f"| `{name}` |" in page for name in FLAGS)
    with pytest.raises(ValueError, match="without is 'xla_gpu_fast'; the flags are xla_gpu"):
        compiler_options(small.mesh, ("xla_gpu_fast",))


@pytest.mark.newest
@pytest.mark.parametrize(
    "make",
    [
        lambda pipe: train.make_step(pipe, adamw(1e-3, 10, 1)),
        train.make_evaluation,
        lambda pipe: pipe.jit(pipe.value_and_grad),
    ],
    ids=["step", "evaluation", "pipe.jit"],
)
def test_a_flag_that_the_compiler_does_not_know_is_refused_before_anything_is_traced(small, make, monkeypatch):
    monkeypatch.setattr(flags, "GPU_PLATFORMS", ("cpu",))
    monkeypatch.setitem(FLAGS, "xla_gpu_fast", flags.Flag(True, "it is not slow"))
    with pytest.raises(ValueError, match="XLA flag xla_gpu_fast=True is not supported by jaxlib .*without_flags"):
        make(small)
    assert compiler_options(small.mesh, ("xla_gpu_fast",)).keys() == FLAGS.keys() - {"xla_gpu_fast"}


@pytest.mark.parametrize("name", compiled.PROGRAMS)
def test_every_program_of_a_run_is_compiled_and_counted(small, name):
    run = compiled.Programs(small, adamw(1e-3, 10, 1), microbatch_size=2, length=16)
    found, state = run.report(name), compiled.state_bytes(small, run.optimizer)
    whole = state.parameters + state.optimizer
    assert found.name == name and found.compile_seconds > 0
    if name == "evaluate":
        assert found.output_bytes == 4 and found.peak_bytes > whole
    elif name == "save":  # padding is not saved, and small arrays are whole on every device
        assert whole / 2 < found.output_bytes < 2 * whole and found.peak_bytes >= whole + found.output_bytes
    else:  # beside the state: two counters, in the step three metrics, and a pointer to each array
        assert whole < found.output_bytes < 1.01 * whole and found.peak_bytes >= whole


def test_an_unknown_program_is_refused(small):
    with pytest.raises(ValueError, match="program is 'fit'; the programs are init, step, evaluate, save"):
        compiled.Programs(small, adamw(1e-3, 10, 1), microbatch_size=2, length=16).report("fit")


@pytest.mark.parametrize("path", sorted(GPUS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_gpu_is_described_to_the_compiler(path):
    target = load_gpu(path.stem).target
    assert target["gpu_device_info"]["device_memory_size"] == load_gpu(path.stem).memory_bytes


@pytest.mark.thorough
def test_gradients_are_the_same_with_the_state_donated(small):
    """The step that is compiled ahead of time is the one that trains."""
    optimizer = adamw(1e-3, 10, 1)
    state = train.init_state(small, optimizer, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (4, 2, 16), 0, 97)
    loss, grads = small.jit(small.value_and_grad)(state.params, {"tokens": tokens, "labels": tokens})
    program, _ = compiled.Programs(small, optimizer, microbatch_size=2, length=16).compile_step()
    placed = jax.device_put(tokens, program.input_shardings[0][1]["tokens"])
    _, metrics = program(state, {"tokens": placed, "labels": placed})
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(jax.device_get(grads))))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
