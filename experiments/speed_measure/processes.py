"""Processes that work together, one a core or a GPU: started, asked, watched, and ended whatever happens.

A group starts one copy of a script for each rank. Every request goes to all ranks, and every rank answers it, so a
group does one thing at a time and two groups can be asked in turns. A rank that dies, or does not answer in time, ends
the whole group with the end of what it wrote to standard error. A rank also ends when whoever started it does.
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

# Pin before anything is imported: a library sizes its thread pools by the cores that it may run on.
_PINNED = (
    "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])}); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
)
_EXPERIMENTS = str(Path(__file__).parents[1])  # where a rank's script finds the packages that it imports
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
# glibc gives every large array back to the system when it is freed, and clears its pages when it is made again. A
# framework that allocates in every microbatch, as eager PyTorch does, would pay for that and for nothing of its own.
KEPT_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


class GroupFailed(RuntimeError):
    """A rank died, or did not answer in time."""


@dataclass
class Group:
    """Ranks that run ``script``; use as a context manager.

    Attributes:
        script: a Python file that calls :func:`serve`.
        ranks: how many.
        gpus: give each rank a GPU; otherwise each gets a core of its own and one thread.
        share_cores: let ranks share cores where there are fewer cores than ranks.
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
            # Groups of two frameworks share the GPUs, so neither may take all of the memory at once.
            environment |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
            environment |= {"CUDA_VISIBLE_DEVICES": str((visible_gpus() or range(self.ranks))[rank])}
        else:
            cores = available_cores()
            # A rank has the devices that it is asked to have, not those that its parent simulates.
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
            GroupFailed: a rank died, or has not answered after ``limit_s`` seconds; nothing of the group runs on.
        """
        if not self._processes:
            raise GroupFailed("the group has ended")
        for process in self._processes:
            try:
                process.stdin.write(json.dumps({"what": what, "arguments": arguments}) + "\n")
                process.stdin.flush()
            except OSError:
                pass  # it has died, as its silence will say
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
        """End every rank and what it has started."""
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
    """This process as one rank of a group that something else has started, for example srun: it answers its own
    requests, and so does every other rank, in the same order. Whoever started the ranks ends them where one hangs."""

    def __init__(self, handlers: dict[str, Callable[..., Any]]):
        self.handlers = handlers

    def ask(self, what: str, limit_s: float, **arguments: Any) -> list[Any]:
        """This rank's answer."""
        return [self.handlers[what](**arguments)]


def serve(handlers: dict[str, Callable[..., Any]]) -> None:
    """A rank's side: answers requests until the group ends. A ValueError refuses; any other error ends the rank."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    requests: queue.Queue = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            requests.put(json.loads(line))
        os._exit(1)  # whoever asked is gone

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
            os._exit(1)  # not by sys.exit, which waits for the other ranks
        print(json.dumps(reply), file=replies, flush=True)


def deprioritize_network_threads() -> int:
    """Let the threads that wait for the network, once a first message has gone through, preempt nobody; how many.

    Gloo's one does not block while another thread of its process holds the lock of a connection, it polls. On a core
    that the two share it can take the core away from the holder, and then polls for a whole time slice: a small
    all-reduce costs 2.5 ms of a core so, and 0.4 ms as a batch thread, which is never woken in another's place.
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
    """The GPUs that CUDA_VISIBLE_DEVICES names; none where it says nothing."""
    return [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
