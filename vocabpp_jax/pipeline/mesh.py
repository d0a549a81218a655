"""The mesh of devices that a pipeline runs on, and the names of its axes."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

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


def make_mesh(
    pipe: int, data: int | None = None, devices: Sequence[jax.Device] | None = None, *, tensor: int = 1
) -> Mesh:
    """A mesh ``data × pipe``, or ``data × pipe × tensor``, of all devices or of those given.

    Pipelines are runs of consecutive devices, and a layer's parts runs within them. ``data``, copies of the model, is
    as many as there are devices for if it is not given.

    Raises:
        ValueError: the sizes do not take every device, or a process of several has none in the mesh.
    """
    devices = list(all_devices() if devices is None else devices)
    copies = data if data is not None else len(devices) // max(1, pipe * tensor)
    if min(pipe, copies, tensor) < 1 or pipe * copies * tensor != len(devices):
        sizes = f"pipe is {pipe}" + f", data {data}" * (data is not None) + f", tensor {tensor}" * (tensor != 1)
        raise ValueError(
            f"{sizes}, and there are {len(devices)} devices; each must be at least 1, and together they take every "
            "device: give other sizes, or devices=jax.devices()[:n] to leave some out"
        )
    shape, names = (copies, pipe, tensor), (DATA, PIPE, TENSOR)
    if tensor == 1:
        shape, names = shape[:2], names[:2]
    _refuse_idle_processes(devices, " × ".join(f"{name} {size}" for name, size in zip(names, shape, strict=True)))
    return Mesh(np.array(devices).reshape(shape), names)


def _refuse_idle_processes(devices: Sequence[jax.Device], mesh: str) -> None:
    """Raises ValueError where a process has no device in the mesh: it could not take part."""
    present = all_devices()
    if not set(devices) <= set(present):  # descriptions of devices, to compile for
        return
    if idle := {device.process_index for device in present} - {device.process_index for device in devices}:
        without = ", ".join(map(str, sorted(idle)))
        raise ValueError(
            f"{jax.process_count()} processes have {len(present)} devices, and the mesh of {mesh} takes "
            f"{len(devices)}, none of process {without}; start fewer processes, or make the mesh larger"
        )


def automatic(mesh: Mesh) -> Mesh:
    """The same devices and axes with shardings that the compiler derives: ``jax.make_mesh`` has them explicit, and
    would want every batch resharded by hand."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
