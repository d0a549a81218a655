"""The device mesh of a pipeline, and the names of its axes."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from .tensor import TENSOR

PIPE = "pipe"
DATA = "data"
GPU_PLATFORMS = ("gpu", "cuda")  # of real devices, and of device descriptions to compile for


def all_devices() -> list[jax.Device]:
    """All devices of the default backend.

    Raises:
        ValueError: JAX cannot start the backends in JAX_PLATFORMS.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as problem:  # the latter if there is no GPU and no other platform is named
        platforms = jax.config.jax_platforms
        named = f"JAX_PLATFORMS is {platforms!r}; JAX" if platforms else "JAX"
        reason = f" ({str(problem).splitlines()[0]})" if str(problem) else ""
        raise ValueError(
            f"{named} cannot start a backend on this machine{reason}; leave JAX_PLATFORMS unset, or install jax's "
            "package for the device"
        ) from None


def make_mesh(
    pipe: int, data: int | None = None, devices: Sequence[jax.Device] | None = None, *, tensor: int = 1
) -> Mesh:
    """A mesh ``data × pipe``, or ``data × pipe × tensor``, of all devices or the given ones.

    A pipeline is a run of consecutive devices, and the parts of a layer are a run within it. ``data``, the number of
    model copies, defaults to as many as the devices allow.

    Raises:
        ValueError: the mesh does not use every device, or a process has no device in it.
    """
    devices = list(all_devices() if devices is None else devices)
    copies = data if data is not None else len(devices) // max(1, pipe * tensor)
    if min(pipe, copies, tensor) < 1 or pipe * copies * tensor != len(devices):
        sizes = f"pipe is {pipe}" + f", data {data}" * (data is not None) + f", tensor {tensor}" * (tensor != 1)
        raise ValueError(
            f"{sizes}, and there are {len(devices)} devices; each must be at least 1, and their product must be the "
            "number of devices: give other sizes, or devices=jax.devices()[:n] to use only some"
        )
    shape, names = (copies, pipe, tensor), (DATA, PIPE, TENSOR)
    if tensor == 1:
        shape, names = shape[:2], names[:2]
    _refuse_idle_processes(devices, " × ".join(f"{name} {size}" for name, size in zip(names, shape, strict=True)))
    return Mesh(np.array(devices).reshape(shape), names)


def _refuse_idle_processes(devices: Sequence[jax.Device], mesh: str) -> None:
    """Raises ValueError if a process has no device in the mesh: it could not take part."""
    present = all_devices()
    if not set(devices) <= set(present):  # device descriptions to compile for
        return
    if idle := {device.process_index for device in present} - {device.process_index for device in devices}:
        without = ", ".join(map(str, sorted(idle)))
        raise ValueError(
            f"{jax.process_count()} processes have {len(present)} devices, and the mesh of {mesh} takes "
            f"{len(devices)}, none of process {without}; start fewer processes, or make the mesh larger"
        )


def automatic(mesh: Mesh) -> Mesh:
    """The same mesh with automatic axes. The axes of ``jax.make_mesh`` are explicit, so every batch would have to be
    resharded by hand."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
