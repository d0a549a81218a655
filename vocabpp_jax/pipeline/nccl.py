"""What NCCL has to be told before it starts.

A pipeline's collectives use several NCCL communicators: all stages, pairs of neighbours, the data axis. Kernels of
different communicators wait for their partners on other devices, so they must start in one order everywhere. NCCL keeps
to the order in which the host issues them, which for one compiled program is the same on all devices, if it is asked to
(since NCCL 2.26; older ones ignore it).
"""

from __future__ import annotations

import importlib.util
import os

LAUNCH_ORDER = "NCCL_LAUNCH_ORDER_IMPLICIT"


def keep_launch_order() -> None:
    """Sets :data:`LAUNCH_ORDER` in this process, unless the environment has it or JAX has no CUDA plug-in.

    NCCL reads it once, so this comes before the first collective.
    """
    if any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        os.environ.setdefault(LAUNCH_ORDER, "1")
