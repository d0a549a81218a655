"""Real processes that run a piece of code together, as the processes of a cluster do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import FAST_COMPILE

from speed_measure.processes import free_port

HERE = Path(__file__).parent
BEGIN = """
import json, os, sys
sys.path[:0] = [{here!r}, {experiments!r}]
from vocabpp_jax.runtime import hosts
hosts.join("localhost:{port}", {count}, {index}, heartbeat_timeout={heartbeat}, join_timeout=200)
process = {index}
hosts.quiet_libraries()
answers = {{}}

def sentence(act):
    try:
        act()
    except Exception as problem:
        return f"{{type(problem).__name__}}: {{problem}}"
    return ""

"""
END = "\nprint('answers', json.dumps(answers), flush=True)\n"


def start_code(code: str, count: int = 2, heartbeat: int = 10, devices: int = 1) -> list[subprocess.Popen]:
    """One process for each rank, with so many CPU devices each. The code knows its rank as ``process``."""
    flags = f"{FAST_COMPILE} --xla_force_host_platform_device_count={devices}"
    port, environment = free_port(), dict(os.environ, XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
    place = {"here": str(HERE), "experiments": str(HERE.parent / "experiments"), "port": port, "heartbeat": heartbeat}
    return [
        subprocess.Popen(
            [sys.executable, "-c", BEGIN.format(**place, count=count, index=index) + code + END],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


def run_code(code: str, count: int = 2, timeout: float = 240, devices: int = 1) -> list[dict]:
    """What the code puts into ``answers``, from each process."""
    running = start_code(code, count, devices=devices)
    try:
        said = [process.communicate(timeout=timeout) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * count, said
    return [json.loads(out.split("answers ", 1)[1]) for out, _ in said]
