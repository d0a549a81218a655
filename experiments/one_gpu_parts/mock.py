"""One real GPU as one of several: the only place that knows how jax is told to pretend.

XLA's mocked topology executes a program for many devices on the ones that are there and skips every collective; what a
collective would have written is undefined. XLA has announced that it may go one day (openxla/xla issue 40443).
"""

from __future__ import annotations

import os

FLAGS = ("--xla_gpu_shard_autotuning=false",)  # or the compiler waits for what the others would have measured


def pretend(devices: int, this: int) -> None:
    """Make the GPU of this process number ``this`` of so many, each on a host of its own. Before anything asks jax for
    a device."""
    import jax

    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()
    jax.config.update("jax_mock_gpu_topology", f"1x{devices}x1")
    jax.config.update("jax_pjrt_client_create_options", {"node_id": this})
