"""Several processes that train one model: how they find each other, and which part of a batch each of them needs."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..pipeline.mesh import DATA
from ..pipeline.nccl import keep_launch_order
from ..pipeline.pipeline import Batch

_GPU_NODES = ("nvidia[0-9]*", "dxg", "kfd")  # in /dev: NVIDIA's, Windows' for Linux guests, AMD's
_PER_MICROBATCH = PartitionSpec(None, DATA)


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_timeout: int = 60,
) -> int:
    """Find the other processes, as SLURM or Open MPI started them or as the arguments say; returns how many there are.

    A process from which nothing is heard for ``heartbeat_timeout`` seconds counts as gone, and the others end.
    To be called before anything asks JAX for a device.

    Raises:
        ValueError: some of the arguments without the others, or nothing that says who the others are.
    """
    explicit = (coordinator, processes, process_id)
    if any(value is not None for value in explicit) and None in explicit:
        raise ValueError("coordinator, processes and process_id are given together or not at all")
    if heartbeat_timeout < 1:
        raise ValueError(f"heartbeat_timeout is {heartbeat_timeout}; it must be at least 1 second")
    timeouts = {"heartbeat_timeout_seconds": heartbeat_timeout, "shutdown_timeout_seconds": heartbeat_timeout}
    if coordinator is not None:
        if not 0 <= process_id < processes:
            raise ValueError(f"process_id is {process_id}; it must be from 0 to {processes - 1}")
        host, colon, port = coordinator.rpartition(":")
        if not (host and colon and port.isdigit() and 0 < int(port) < 2**16):
            raise ValueError(f"coordinator is {coordinator!r}; it must be HOST:PORT")
        _initialize(*explicit, **timeouts)
        return processes
    processes = os.environ.get("SLURM_NTASKS") or os.environ.get("OMPI_COMM_WORLD_SIZE") or ""
    if not processes.isdigit() or not int(processes):
        raise ValueError(
            "distributed is set, but neither SLURM nor Open MPI has started this process; "
            "give coordinator, processes and process_id"
        )
    _initialize(**timeouts)
    return int(processes)


def _initialize(*arguments: Any, **timeouts: int) -> None:
    keep_launch_order()
    try:
        jax.distributed.initialize(*arguments, **timeouts)
    except (RuntimeError, OSError) as problem:  # nobody listens, somebody else does, or not all came in time
        where = arguments[0] if arguments else "the coordinator"
        raise ValueError(
            f"{socket.gethostname()} cannot join the other processes at {where}: {str(problem).splitlines()[0]}"
        ) from None


def agree(act: Callable[[], Any]) -> Any:
    """Call it in every process; where it raises ValueError in one of them, it does in all, with that sentence."""
    if jax.process_count() == 1:
        return act()
    result, sentence = None, ""
    try:
        result = act()
    except ValueError as problem:
        sentence = str(problem) or "refused"
    for said in _gathered(sentence):
        if said:
            raise ValueError(said)
    return result


def from_first(text: str) -> str:
    """The text that process 0 has."""
    return text if jax.process_count() == 1 else _gathered(text)[0]


def _gathered(text: str) -> list[str]:
    """Every process' text, up to 2000 bytes of it."""
    raw = np.frombuffer(text.encode()[:2000], np.uint8)
    buffers = multihost_utils.process_allgather(np.pad(raw, (0, 2000 - len(raw))))
    return [bytes(buffer[buffer > 0]).decode(errors="replace") for buffer in np.asarray(buffers)]


def columns(mesh: Mesh, batch: int) -> list[int]:
    """Which of the ``batch`` sequences of a microbatch the devices of this process train on, ascending."""
    indices = NamedSharding(mesh, _PER_MICROBATCH).addressable_devices_indices_map((1, batch)).values()
    return sorted({column for index in indices for column in range(*index[1].indices(batch))})


def place(mesh: Mesh, batch: int, local: Batch) -> Batch:
    """A batch of which this process has its :func:`columns` ``[m, columns, ...]``, as global arrays ``[m, batch, ...]``
    split over the data axis."""
    sharding, mine = NamedSharding(mesh, _PER_MICROBATCH), columns(mesh, batch)

    def put(array: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            wanted = range(*index[1].indices(batch))
            first = mine.index(wanted[0])
            return array[:, first : first + len(wanted)]

        return jax.make_array_from_callback((array.shape[0], batch, *array.shape[2:]), sharding, part)

    return jax.tree.map(put, local)


def quiet_libraries() -> None:
    """Keep the tracebacks that libraries log to themselves: whoever runs training gets the sentence instead."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def quiet_plugins() -> None:
    """Silence jax's report, with a traceback, that its packages for GPUs find none, on a machine that has none."""
    if not any(found for node in _GPU_NODES for found in Path("/dev").glob(node)):
        logging.getLogger("jax._src.xla_bridge").addFilter(_is_no_plugin_report)


def _is_no_plugin_report(record: logging.LogRecord) -> bool:
    return "Jax plugin configuration error: Exception when calling" not in record.getMessage()
