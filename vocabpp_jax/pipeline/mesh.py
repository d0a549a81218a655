"""The mesh of devices that a pipeline runs on, and the names of its axes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from .tensor import TENSOR

PIPE = "pipe"
DATA = "data"
GPU_PLATFORMS = ("gpu", "cuda")  # of devices that are there, and of descriptions of such as are not


def all_devices() -> list[jax.Device]:
    """All devices of the default backend.

    Raises:
        ValueError: JAX cannot start the backends that JAX_PLATFORMS names.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as problem:  # the latter where there is no GPU and nothing else is named
        platforms = jax.config.jax_platforms
        named = f"JAX_PLATFORMS is {platforms!r}; JAX" if platforms else "JAX"
        reason = f" ({str(problem).splitlines()[0]})" if str(problem) else ""
        raise ValueError(
            f"{named} can start no such backend on this machine{reason}; leave JAX_PLATFORMS unset, or install jax's "
            "package for the device"
        ) from None


def make_mesh(pipe: int, data: int = 1, devices: Sequence[jax.Device] | None = None, *, tensor: int = 1) -> Mesh:
    """A mesh ``data × pipe``, or ``data × pipe × tensor``, of the first devices that it needs; pipelines are runs of
    consecutive devices, and a layer's parts runs within them.

    Raises:
        ValueError: the devices are fewer than ``data · pipe · tensor``, or not a multiple of it; without ``devices``,
            also if a process of several has none in the mesh.
    """
    everyone = devices is None
    devices = list(all_devices() if devices is None else devices)
    if min(pipe, data, tensor) < 1 or len(devices) % (pipe * data * tensor):
        also = f" and tensor {tensor}" if tensor != 1 else ""
        raise ValueError(
            f"pipe is {pipe} and data {data}{also}; each must be at least 1, and their product must divide the "
            f"{len(devices)} devices"
        )
    shape, names = ((data, pipe), (DATA, PIPE)) if tensor == 1 else ((data, pipe, tensor), (DATA, PIPE, TENSOR))
    used = devices[: math.prod(shape)]
    idle = {device.process_index for device in devices} - {device.process_index for device in used}
    if everyone and idle:
        sizes = " × ".join(f"{name} {size}" for name, size in zip(names, shape, strict=True))
        raise ValueError(
            f"{jax.process_count()} processes have {len(devices)} devices, and the mesh of {sizes} takes {len(used)}, "
            f"none of process {', '.join(map(str, sorted(idle)))}; start fewer processes, or make the mesh larger"
        )
    return Mesh(np.array(used).reshape(shape), names)
