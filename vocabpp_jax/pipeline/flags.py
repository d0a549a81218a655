"""The XLA flags that a pipeline on GPUs wants, each with its reason.

They are given to the compiler with the train step, so nothing has to be set in the environment. What each does to the
compiled program is in docs/memory.md, from ``experiments/memory.py --without FLAG``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from jax.sharding import Mesh

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
    "xla_gpu_all_reduce_combine_threshold_bytes": Flag(
        0, "a sum that is needed early is not merged with one that is made late"
    ),
}


def compiler_options(mesh: Mesh, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """The options for a mesh's devices: :data:`FLAGS` on GPUs, none elsewhere.

    Raises:
        ValueError: a flag in ``without`` that is not set in the first place.
    """
    for name in without:
        if name not in FLAGS:
            raise ValueError(f"without is {name!r}; the flags are {', '.join(FLAGS)}")
    if mesh.devices.flat[0].platform not in GPU_PLATFORMS:
        return {}
    return {name: flag.value for name, flag in FLAGS.items() if name not in without}
