"""How the communication of a program runs on a GPU: which stream it takes, and in which order NCCL launches it.

XLA runs all asynchronous collectives and permutes of a device on one stream, unless an attribute names another. There,
a transfer would wait for every collective that started before it, so transfers get a stream of their own.

A pipeline's collectives use several NCCL communicators: all stages, pairs of neighbours, the data axis. A kernel waits
for its peers on other devices, so kernels of different communicators must launch in the same order everywhere. If asked
to, NCCL launches them in the order in which the host issues them, which for one compiled program is the same on all
devices (NCCL 2.26 and later; earlier versions ignore the setting).
"""

from __future__ import annotations

import importlib.util
import os

LAUNCH_ORDER = "NCCL_LAUNCH_ORDER_IMPLICIT"
TRANSFER_STREAM = {"_xla_stream_annotation": "1"}
"""XLA's attribute for the communication stream of an operation; without it, it is stream 0."""


def keep_launch_order() -> None:
    """Sets :data:`LAUNCH_ORDER` in this process, unless it is set already or JAX has no CUDA plugin.

    NCCL reads it once, so call this before the first collective.
    """
    if any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        os.environ.setdefault(LAUNCH_ORDER, "1")
