"""The XLA flags that a pipeline on GPUs wants, each with its reason.

:meth:`.Pipeline.jit` gives them to the compiler, so nothing has to be set in the environment. What each does to the
compiled program is in docs/memory.md, from ``experiments/memory.py --without FLAG``.
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
    """A compiler option and why it is set."""

    value: Any
    reason: str


FLAGS: dict[str, Flag] = {
    "xla_gpu_enable_latency_hiding_scheduler": Flag(
        True, "starts a collective as early and waits for it as late as the program allows"
    ),
    "xla_gpu_experimental_parallel_collective_overlap_limit": Flag(
        4, "the broadcast, the two sums and the transfers of an interval may be under way together"
    ),
    "xla_gpu_enable_command_buffer": Flag(
        "CONDITIONAL,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,FUSION",
        "CUDA graphs of everything but loops: with WHILE, steps on an H100 hung or took 5% longer (docs/gpu.md)",
    ),
}


def compiler_options(mesh: Mesh, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """The options for a mesh's devices: :data:`FLAGS` on GPUs, none elsewhere.

    Raises:
        ValueError: a flag in ``without`` that is not set in the first place, or a flag that this jaxlib does not take.
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
    """Raises ValueError naming a flag that the compiler does not take, by compiling next to nothing with all of them.

    The compiler is asked because no list of its flags can be had, and before the first real program is traced.
    """
    nothing = jax.jit(lambda: jnp.zeros(()), out_shardings=NamedSharding(mesh, PartitionSpec())).lower()
    try:
        nothing.compile(dict(options))
    except jax.errors.JaxRuntimeError as problem:
        for name, value in options:
            if name in str(problem):
                raise ValueError(
                    f"XLA flag {name}={value} is not one that jaxlib {jaxlib.__version__} takes ({problem}); "
                    "leave it out with without_flags, or install a jaxlib that takes it"
                ) from None
        raise
