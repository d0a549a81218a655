"""The GPU programs of one_gpu.py, compiled for an H100 that is not there."""

import dataclasses

import pytest
from conftest import needs_gpu_packages

from one_gpu_parts import gpu_parity, kernels, loop_overhead, pass_times, stages
from one_gpu_parts.gpu_sizes import Row
from vocabpp_jax import compiled, make_mesh
from vocabpp_jax.schedules.simulation.cost import load_gpu

pytestmark = [pytest.mark.h100, needs_gpu_packages]


@pytest.fixture(scope="module")
def devices():
    return compiled.devices(load_gpu("h100-80g"), 2)


@pytest.mark.parametrize("case", [("vocab-2", "float32", "xla"), ("vocab-1", "bfloat16", "cudnn")], ids=str)
def test_parity(devices, case):
    shape = (("layers", 1), ("hidden", 128), ("heads", 2))
    _, program = gpu_parity.compile_case(gpu_parity.Case(*case, shape=shape), devices[0])
    assert ("fmha" in program.as_text()) == (case[2] == "cudnn")


@pytest.mark.parametrize(
    ("method", "names"), [("baseline", pass_times.LAYER_PASSES), ("vocab-2", pass_times.VOCABULARY_PASSES)]
)
def test_passes(devices, method, names):
    row = Row("4B", 8, (8192,), (1024,))
    case = next(c for c in [*pass_times.layer_cases(row, 1024), *pass_times.vocabulary_cases(row, 1024)]
                if c.names == names and c.method == method)  # fmt: skip
    passes = dataclasses.replace(case, layers=1).build(2**10, devices[0])
    program, _ = passes.compile(1024, 8192)
    assert program.memory_analysis().temp_size_in_bytes > 0


@pytest.mark.parametrize("buffers", ["default", "loops"])
def test_steps_with_and_without_loops_in_command_buffers(devices, buffers):
    shape = dict(layers=1, heads=2, hidden=128, seq=128, vocab_size=1000)
    _, program, count = loop_overhead.compiled_step(shape, 4, f"vocab-2, {buffers}", devices[0])
    assert count > 0 and "fmha" in program.as_text()


def test_the_step_of_a_stage(devices):
    case = {"model": "gpt-tiny", "p": 2, "seq": 64, "vocab_size": 1000, "method": "vocab-2", "microbatches": 4}
    pipe, optimizer = stages.build(case, make_mesh(2, devices=devices))
    lowered, _ = stages.lower_step(pipe, optimizer, 64)
    program = lowered.compile(compiler_options=stages.command_buffers("loops"))
    assert program.memory_analysis().peak_memory_in_bytes > 0


def test_kernels(devices):
    run, shapes, _ = kernels.attention(2, 128, 256, True, devices[0])
    assert "fmha" in kernels.compile_kernel(run, shapes, devices[0]).as_text()
