"""XLA flags for pipelines on GPUs, each with the reason it is set.

:meth:`.Pipeline.jit` passes them to the compiler, so nothing has to be set in the environment. docs/memory.md shows how
each affects the compiled program, as measured by ``experiments/memory.py --without FLAG``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .mesh import GPU_PLATFORMS


class Flag(NamedTuple):
    """The value of a compiler option, and the reason for it."""

    value: Any
    reason: str


FLAGS: dict[str, Flag] = {
    "xla_gpu_enable_latency_hiding_scheduler": Flag(
        True, "collectives overlap with passes, and are waited for as late as the program allows"
    ),
    "xla_gpu_experimental_collective_start_as_early_as_possible": Flag(
        True, "collectives start where the program has them; XLA alone would start them as late as it thinks it can"
    ),
    "xla_gpu_experimental_parallel_collective_overlap_limit": Flag(
        1024, "no limit: the program decides how many collectives and transfers are in flight together"
    ),
    "xla_gpu_collective_permute_combine_threshold_bytes": Flag(
        0, "transfers between the same devices stay apart: an early one would wait for a late one"
    ),
    "xla_gpu_memory_limit_slop_factor": Flag(
        200, "no limit: with less than a fifth of the GPU's memory free, XLA would let no collective overlap"
    ),
    "xla_gpu_enable_command_buffer": Flag(
        "CONDITIONAL,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,FUSION",
        "CUDA graphs of everything but loops: with WHILE, steps on an H100 hung or took 5% longer (docs/gpu.md)",
    ),
}


def compiler_options(mesh: Mesh, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """The compiler options for a mesh's devices: :data:`FLAGS` on GPUs, none elsewhere.

    Raises:
        ValueError: a name in ``without`` is not in :data:`FLAGS`, or this jaxlib does not support a flag.
    """
    for name in without:
        if name not in FLAGS:
            raise ValueError(f"without is {name!r}; the flags are {', '.join(FLAGS)}")
    if mesh.devices.flat[0].platform not in GPU_PLATFORMS:
        return {}
    options = {name: flag.value for name, flag in FLAGS.items() if name not in without}
    _check_known(mesh, tuple(options.items()))
    return options


@lru_cache(maxsize=8)
def _check_known(mesh: Mesh, options: tuple[tuple[str, Any], ...]) -> None:
    """Compiles a trivial program with all options; raises ValueError naming a flag that the compiler rejects.

    The compiler does not list its flags, so trying them is the only check. It runs before the first real program is
    traced.
    """
    nothing = jax.jit(lambda: jnp.zeros(()), out_shardings=NamedSharding(mesh, PartitionSpec())).lower()
    try:
        nothing.compile(dict(options))
    except jax.errors.JaxRuntimeError as problem:
        for name, value in options:
            if name in str(problem):
                raise ValueError(
                    f"XLA flag {name}={value} is not supported by jaxlib {jaxlib.__version__} ({problem}); "
                    "leave it out with without_flags, or install a jaxlib that supports it"
                ) from None
        raise
