"""One real GPU posing as one of several: the only place that knows how to make jax pretend.

XLA's mocked topology executes a program for many devices on those present and skips every collective; what a collective
would have written is undefined. XLA has announced that it may be removed one day (openxla/xla issue 40443).
"""

from __future__ import annotations

import os

FLAGS = ("--xla_gpu_shard_autotuning=false",)  # otherwise the compiler waits for measurements from the other devices


def pretend(devices: int, this: int) -> None:
    """Make this process's GPU number ``this`` of ``devices``, each on its own host. Call this before anything asks jax
    for a device."""
    import jax

    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()
    jax.config.update("jax_mock_gpu_topology", f"1x{devices}x1")
    jax.config.update("jax_pjrt_client_create_options", {"node_id": this})
