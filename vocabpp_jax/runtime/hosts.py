"""Multi-process training: how processes find each other, and which part of a batch each needs."""

from __future__ import annotations

import json
import logging
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..pipeline.mesh import DATA
from ..pipeline.nccl import keep_launch_order
from ..pipeline.pipeline import Batch
from . import clusters
from .faults import LastWords, as_sentence, reason

Result = TypeVar("Result")
Errors = tuple[type[Exception], ...]
_GPU_NODES = ("nvidia[0-9]*", "dxg", "kfd")  # in /dev: NVIDIA's, Windows' for Linux guests, AMD's
_PER_MICROBATCH = PartitionSpec(None, DATA)


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_timeout: int = 60,
    join_timeout: int | None = None,
) -> int:
    """Find the other processes, as started by SLURM or Open MPI or as the arguments say; returns how many there are.

    A process that is silent for ``heartbeat_timeout`` seconds counts as lost, and the others end. If not all processes
    have joined within ``join_timeout`` seconds (by default JAX's 300), those that have end, with a sentence. Call this
    before anything asks JAX for a device.

    Raises:
        ValueError: some of the arguments without the others, or nothing that identifies the other processes.
    """
    explicit = (coordinator, processes, process_id)
    if any(value is not None for value in explicit) and None in explicit:
        raise ValueError("coordinator, processes and process_id are given together or not at all")
    for name, value in (("heartbeat_timeout", heartbeat_timeout), ("join_timeout", join_timeout)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1 second")
    settings: dict[str, Any] = {
        "heartbeat_timeout_seconds": heartbeat_timeout,
        "shutdown_timeout_seconds": heartbeat_timeout,
    }
    if join_timeout is not None:
        settings["initialization_timeout"] = join_timeout
    if (gpus := clusters.own_gpus()) is not None:
        settings["local_device_ids"] = gpus
    if coordinator is not None:
        if not 0 <= process_id < processes:
            raise ValueError(f"process_id is {process_id}; it must be from 0 to {processes - 1}")
        host, colon, port = coordinator.rpartition(":")
        if not (host and colon and port.isdigit() and 0 < int(port) < 2**16):
            raise ValueError(f"coordinator is {coordinator!r}; it must be HOST:PORT")
        _initialize(*explicit, **settings)
        return processes
    processes = clusters.launched_processes()
    _initialize(**settings)
    return processes


def leave() -> None:
    """Wait for the other processes to reach this point too, then disconnect from them. JAX would do so at exit, where
    nobody could say why a process ends that waits for one that is gone."""
    if jax.process_count() > 1:
        jax.distributed.shutdown()


def _initialize(*arguments: Any, **settings: Any) -> None:
    keep_launch_order()
    where = f"at {arguments[0]}" if arguments else "that the launcher has started"
    begins = f"{socket.gethostname()} cannot join the other processes {where}"
    try:
        with LastWords(f"{begins}: not all joined in time", who=""):  # JAX ends the process
            jax.distributed.initialize(*arguments, **settings)
    except ValueError as problem:  # the launcher's environment is not enough for JAX
        raise ValueError(
            f"JAX cannot tell from the environment how this process was started ({reason(problem)}); start it with "
            f"srun or mpirun, or {clusters.explicit_options('N', 'I')}"
        ) from None
    except (RuntimeError, OSError) as problem:  # nobody listens, or someone else does
        raise ValueError(f"{begins}: {reason(problem)}") from None


class Agreed(ValueError):
    """All processes raise it at the same point, so they can still wait for each other."""


def agree(act: Callable[[], Result]) -> Result:
    """Call ``act`` in every process and wait for all of them. If it fails in one, all raise the same Agreed.

    An error other than ValueError and OSError is a bug: the process that hit it raises it unchanged.
    """
    return attempts(act, ())[0]


def attempts(act: Callable[[], Result], expected: Errors) -> tuple[Result | None, list[str]]:
    """Like :func:`agree`, but errors of an ``expected`` type are returned: one sentence per process, "" for success."""
    result, problem = None, None
    try:
        result = act()
    except Exception as error:
        problem = error
    answers = gathered([isinstance(problem, expected), "" if problem is None else as_sentence(problem)])
    if not isinstance(problem, (ValueError, OSError, *expected, type(None))):
        raise problem
    raise_first(["" if known else sentence for known, sentence in answers])
    return result, [sentence for _, sentence in answers]


def raise_first(sentences: list[str]) -> None:
    """Raise Agreed with the first non-empty sentence, naming its process if others differ."""
    for process, said in enumerate(sentences):
        if said:
            raise Agreed(said if len({*sentences}) == 1 else f"process {process} of {len(sentences)}: {said}")


def check_same(what: str, values: dict[str, Any]) -> None:
    """Raise Agreed in every process unless all have the same ``values`` (JSON), naming those that differ."""
    first, here = gathered(values)[0], jax.process_index()

    def compare() -> None:
        if different := [name for name in sorted(first.keys() | values.keys()) if first.get(name) != values.get(name)]:
            both = [f"{n} is {first.get(n)!r} in process 0 and {values.get(n)!r} in process {here}" for n in different]
            raise ValueError(f"{what} must be the same in all processes: {', '.join(both)}")

    agree(compare)


def from_first(value: Any) -> Any:
    """The JSON value that process 0 passes. The other processes' values are ignored."""
    if jax.process_count() == 1:
        return value
    raw = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(raw))))
    raw = raw if jax.process_index() == 0 else np.zeros(size, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(raw)).astype(np.uint8).tobytes())


def gathered(value: Any) -> list[Any]:
    """The JSON values that all processes pass, in process order."""
    if jax.process_count() == 1:
        return [value]
    raw = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(raw)))).ravel()
    longest = -(-int(sizes.max()) // 1024) * 1024  # few distinct sizes: each compiles its own program
    padded = np.pad(raw, (0, longest - len(raw)))
    buffers = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [json.loads(buffer[:size].tobytes()) for buffer, size in zip(buffers, sizes, strict=True)]


def columns(mesh: Mesh, batch: int) -> list[int]:
    """Which of a microbatch's ``batch`` sequences this process's devices train on, ascending."""
    indices = NamedSharding(mesh, _PER_MICROBATCH).addressable_devices_indices_map((1, batch)).values()
    return sorted({column for index in indices for column in range(*index[1].indices(batch))})


def place(mesh: Mesh, batch: int, local: Batch) -> Batch:
    """Global arrays ``[m, batch, ...]``, sharded over the data axis, from this process's :func:`columns`.

    Local arrays are ``[m, columns, ...]``.
    """
    sharding, mine = NamedSharding(mesh, _PER_MICROBATCH), columns(mesh, batch)

    def put(array: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            wanted = range(*index[1].indices(batch))
            first = mine.index(wanted[0])
            return array[:, first : first + len(wanted)]

        return jax.make_array_from_callback((array.shape[0], batch, *array.shape[2:]), sharding, part)

    return jax.tree.map(put, local)


def quiet_libraries() -> None:
    """Suppress the tracebacks that libraries log: users get the sentence instead."""
    for name in ("absl", "asyncio", "gcsfs", "google.auth"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # Orbax leaves these behind when what it reads is damaged.
    warnings.filterwarnings("ignore", message="coroutine '.*' was never awaited", category=RuntimeWarning)


def quiet_plugins() -> None:
    """On a machine without GPUs, silence jax's report, with a traceback, that its GPU packages find none."""
    if not any(found for node in _GPU_NODES for found in Path("/dev").glob(node)):
        logging.getLogger("jax._src.xla_bridge").addFilter(_is_no_plugin_report)


def _is_no_plugin_report(record: logging.LogRecord) -> bool:
    return "Jax plugin configuration error: Exception when calling" not in record.getMessage()
