"""Facts about the devices a run is on: peak FLOP/s, memory in use."""

from __future__ import annotations

import jax

from ..schedules.simulation.cost import GPU, gpu_names, load_gpu


def known_gpu(device: jax.Device) -> GPU | None:
    """The GPU whose name, up to the first dash, is a word of the device's kind (``NVIDIA H100 80GB HBM3``)."""
    words = device.device_kind.lower().replace("-", " ").split()
    return next((load_gpu(name) for name in gpu_names() if name.split("-")[0] in words), None)


def mfu(flops: float, seconds: float, devices: list[jax.Device]) -> float | None:
    """Model FLOPs utilization, 0 to 1, against the dense bfloat16 peak; None if the hardware is unknown."""
    gpu = known_gpu(devices[0])
    return flops / (seconds * len(devices) * gpu.peak_flops) if gpu else None


def peak_memory() -> int | None:
    """The highest peak memory among this process's devices, in bytes; None if the platform does not report it."""
    statistics = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in statistics if "peak_bytes_in_use" in s]
    return max(peaks, default=None)
