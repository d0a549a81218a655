"""What the launcher, SLURM or Open MPI, says about a process: how many there are, and which GPUs it owns."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

OPEN_MPI_SIZE, SLURM_SIZE = "OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS"
_OPEN_MPI_ADDRESS = "OMPI_MCA_orte_hnp_uri"
"""Where JAX reads the coordinator's address. Open MPI 5 does not set it."""
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


def launched_processes(environment: Mapping[str, str] = os.environ) -> int:
    """The number of processes the launcher started.

    Raises:
        ValueError: no launcher, or one from which JAX cannot learn the coordinator's address.
    """
    # With mpirun inside a SLURM job, SLURM's variables count nodes, not processes.
    for name in (OPEN_MPI_SIZE, SLURM_SIZE):
        if (value := environment.get(name, "")).isdigit() and int(value):
            break
    else:
        raise ValueError(
            f"distributed is set, but neither SLURM nor Open MPI has started this process; {explicit_options('N', 'I')}"
        )
    if name == OPEN_MPI_SIZE and _OPEN_MPI_ADDRESS not in environment:
        raise ValueError(
            "distributed is set, but Open MPI 5 and later do not say where the coordinator is; "
            f"{explicit_options('$OMPI_COMM_WORLD_SIZE', '$OMPI_COMM_WORLD_RANK')}"
        )
    return int(value)


def explicit_options(processes: str, process_id: str) -> str:
    """Advice for when JAX cannot find the other processes."""
    return (
        "give coordinator, processes and process_id "
        f"(--coordinator HOST:PORT --processes {processes} --process-id {process_id})"
    )


def own_gpus(environment: Mapping[str, str] = os.environ) -> list[int] | None:
    """The GPUs this process should use, as indices into those it can see; None leaves the choice to JAX.

    JAX gives the n-th process of a host the n-th GPU, which does not exist where the launcher shows each process only
    its own. Here, a process that sees only its own GPUs uses all of them; otherwise the visible GPUs are split evenly.
    """
    visible = next((environment[name] for name in _VISIBLE if name in environment), None)
    # "NoDevFiles" is SLURM's way of saying none.
    count = len([gpu for gpu in (visible or "").split(",") if gpu.strip() and gpu.strip() not in ("-1", "NoDevFiles")])
    rank = _number(environment, "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")
    tasks, each = _tasks_on_this_host(environment), _gpus_per_task(environment)
    if visible is None:
        count = each or 0  # then SLURM hides the other GPUs by other means
    if not count or rank is None or "JAX_LOCAL_DEVICE_IDS" in environment:
        return None
    if count == 1 or each == count or (tasks is not None and count < tasks):
        return list(range(count))
    if each is None:
        if tasks is None:
            return None
        each = count // tasks
    first = rank * each
    return list(range(first, first + each)) if first + each <= count else None


def _number(environment: Mapping[str, str], *names: str) -> int | None:
    return next((int(environment[name]) for name in names if environment.get(name, "").isdigit()), None)


def _gpus_per_task(environment: Mapping[str, str]) -> int | None:
    """``2`` or, with a type, ``a100:2``."""
    found = re.search(r"(?:^|:)([1-9]\d*)$", environment.get("SLURM_GPUS_PER_TASK", ""))
    return int(found[1]) if found else None


def _tasks_on_this_host(environment: Mapping[str, str]) -> int | None:
    if (tasks := _number(environment, "OMPI_COMM_WORLD_LOCAL_SIZE")) is not None:
        return tasks
    # For example 8(x2),4: eight tasks on each of two hosts, four on the third.
    hosts: list[int] = []
    counts = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or ""
    for part in counts.split(","):
        if not (found := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)):
            return None
        hosts += [int(found[1])] * int(found[2] or 1)
    host = _number(environment, "SLURM_NODEID")
    return hosts[host or 0] if (host or 0) < len(hosts) else None
