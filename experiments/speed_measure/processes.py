"""Cooperating processes, one per core or GPU: started, queried, watched, and always ended.

A group starts one copy of a script for each rank. Every request goes to all ranks and every rank answers it, so a group
does one thing at a time and two groups can be queried in turns. A rank that dies, or does not answer in time, ends the
whole group with the last lines of its standard error. A rank also ends when its parent does.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

# Pin before importing anything: libraries size their thread pools by the available cores.
_PINNED = (
    "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])}); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
)
_EXPERIMENTS = str(Path(__file__).parents[1])  # where a rank's script finds the packages that it imports
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
# glibc returns every large array to the system when it is freed, and page faults zero it again when it is reallocated.
# A framework that allocates in every microbatch, as eager PyTorch does, would pay for that and not for its own work.
KEPT_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


class GroupFailed(RuntimeError):
    """A rank died, or did not answer in time."""


@dataclass
class Group:
    """Ranks that run ``script``; use as a context manager.

    Attributes:
        script: a Python file that calls :func:`serve`.
        ranks: number of ranks.
        gpus: give each rank a GPU; otherwise each gets its own core and one thread.
        share_cores: let ranks share cores if there are fewer cores than ranks.
    """

    script: Path
    ranks: int
    gpus: bool = False
    share_cores: bool = False
    _processes: list[subprocess.Popen] = field(default_factory=list, init=False, repr=False)
    _logs: list[Any] = field(default_factory=list, init=False, repr=False)
    _answers: queue.Queue = field(default_factory=queue.Queue, init=False, repr=False)

    def __post_init__(self) -> None:
        cores = available_cores()
        if not self.gpus and self.ranks > len(cores) and not self.share_cores:
            raise ValueError(
                f"stages is {self.ranks}; there are {len(cores)} cores, and each stage needs its own, "
                "unless share_cores is set"
            )

        visible = len(visible_gpus())
        if self.gpus and 0 < visible < self.ranks:
            raise ValueError(
                f"stages is {self.ranks}; CUDA_VISIBLE_DEVICES names {visible} GPUs, and each stage needs its own"
            )

    def __enter__(self) -> Group:
        try:
            for rank in range(self.ranks):
                self._start(rank)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, rank: int) -> None:
        environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(self.ranks)}
        environment |= {"PYTHONPATH": os.pathsep.join(filter(None, (_EXPERIMENTS, os.environ.get("PYTHONPATH"))))}
        command = [sys.executable, str(self.script)]
        if self.gpus:
            # Groups of two frameworks share the GPUs, so neither may allocate all of the memory at once.
            environment |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
            environment |= {"CUDA_VISIBLE_DEVICES": str((visible_gpus() or range(self.ranks))[rank])}
        else:
            cores = available_cores()
            # A rank has the devices it is told to have, not those that its parent simulates.
            flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
            flags = " ".join([*flags, "--xla_cpu_multi_thread_eigen=false"])
            environment |= ONE_THREAD | KEPT_MEMORY
            environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "CUDA_VISIBLE_DEVICES": ""}
            command = [sys.executable, "-c", _PINNED, str(cores[rank % len(cores)]), str(self.script)]
        log = tempfile.TemporaryFile(mode="w+", errors="replace")
        self._logs.append(log)
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            text=True,
            start_new_session=True,
        )
        self._processes.append(process)
        threading.Thread(target=self._listen, args=(rank, process.stdout), daemon=True).start()

    def _listen(self, rank: int, stream: Any) -> None:
        for line in stream:
            self._answers.put((rank, line))
        self._answers.put((rank, None))

    def ask(self, what: str, limit_s: float, **arguments: Any) -> list[Any]:
        """The answers of all ranks to one request.

        Raises:
            ValueError: a rank refused it, with its reason.
            GroupFailed: a rank died, or did not answer within ``limit_s`` seconds; the whole group has been ended.
        """
        if not self._processes:
            raise GroupFailed("the group has ended")
        for process in self._processes:
            try:
                process.stdin.write(json.dumps({"what": what, "arguments": arguments}) + "\n")
                process.stdin.flush()
            except OSError:
                pass  # it has died, as its silence will show
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + limit_s
        while len(answers) < self.ranks:
            try:
                rank, line = self._answers.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                silent = [rank for rank in range(self.ranks) if rank not in answers]
                self._fail(f"{what} took more than {limit_s:.0f} s", silent)
            if line is None:
                self._fail(f"rank {rank} died in {what}", [rank])
            answers[rank] = json.loads(line)
        for answer in answers.values():
            if "refused" in answer:
                raise ValueError(answer["refused"])
        return [answers[rank]["answer"] for rank in range(self.ranks)]

    def _fail(self, sentence: str, ranks: list[int]) -> NoReturn:
        ends = "\n".join(f"--- rank {rank}:\n{self._end_of_log(rank)}" for rank in ranks)
        self.close()
        raise GroupFailed(f"{sentence}\n{ends}")

    def _end_of_log(self, rank: int, lines: int = 20) -> str:
        self._logs[rank].seek(0)
        return "\n".join(self._logs[rank].read().splitlines()[-lines:])

    def close(self) -> None:
        """End every rank and everything it started."""
        for process in self._processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        for process in self._processes:
            process.wait()
            process.stdin.close()
            process.stdout.close()
        for log in self._logs:
            log.close()
        self._processes, self._logs = [], []


class Here:
    """This process as one rank of a group started by something else, for example srun.

    It answers its own requests, as does every other rank, in the same order. The launcher ends the ranks if one hangs.
    """

    def __init__(self, handlers: dict[str, Callable[..., Any]]):
        self.handlers = handlers

    def ask(self, what: str, limit_s: float, **arguments: Any) -> list[Any]:
        """This rank's answer."""
        return [self.handlers[what](**arguments)]


def serve(handlers: dict[str, Callable[..., Any]]) -> None:
    """A rank's side: answers requests until the group ends. ValueError refuses a request; other errors end the rank."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep library output out of the answers
    requests: queue.Queue = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            requests.put(json.loads(line))
        os._exit(1)  # the parent is gone

    threading.Thread(target=listen, daemon=True).start()
    while True:
        request = requests.get()
        try:
            reply = {"answer": handlers[request["what"]](**request["arguments"])}
        except ValueError as problem:
            traceback.print_exc()
            reply = {"refused": str(problem)}
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)  # not sys.exit, which waits for the other ranks
        print(json.dumps(reply), file=replies, flush=True)


def deprioritize_network_threads() -> int:
    """Keep the threads that wait for the network from preempting others; returns how many. Call after a first message.

    Gloo's thread does not block while another thread of its process holds a connection's lock; it polls. On a shared
    core it can preempt the holder and then poll for a whole time slice: a small all-reduce then costs 2.5 ms of a core,
    but 0.4 ms with a batch thread, which never preempts another on wake-up.
    """
    time.sleep(0.1)  # for the message's last events
    calmed = 0
    for task in Path("/proc/self/task").glob("*"):
        if "epoll" in (task / "wchan").read_text():
            os.sched_setscheduler(int(task.name), os.SCHED_BATCH, os.sched_param(0))
            calmed += 1
    return calmed


def available_cores() -> list[int]:
    """The cores that this process may run on."""
    if not hasattr(os, "sched_getaffinity"):
        raise ValueError("this operating system cannot pin a process to a core; use Linux")
    return sorted(os.sched_getaffinity(0))


def visible_gpus() -> list[str]:
    """The GPUs that CUDA_VISIBLE_DEVICES names; none if it is not set."""
    return [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]


def free_port() -> int:
    """A free TCP port."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
