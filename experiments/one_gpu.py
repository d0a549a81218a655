"""Everything that a single GPU can tell about a pipeline of many, in one command.

    python experiments/one_gpu.py --output runs/gpu
    python experiments/one_gpu.py --quick --only parity,overhead

Five parts, each in its own process and writing OUTPUT/PART.json as it goes: ``parity`` of loss and gradients;
``overhead`` of the executor, with and without command buffers for loops; ``passes``, the time of every pass of the
published models; ``stages``, every stage's real program under a mocked topology; ``torch``, PyTorch's layer and head.
Takes at most eight minutes; with --quick, the most important parts in two and a half. Needs jax, flax, optax and numpy.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PARTS = ("parity", "overhead", "passes", "stages", "torch")
SHARES = {"parity": 0.17, "overhead": 0.22, "passes": 0.6, "stages": 0.72, "torch": 1.0}
"""The share of the remaining time that a part may take."""
EXPERIMENTS = Path(__file__).resolve().parent


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    output, status = Path(options.output), 0
    output.mkdir(parents=True, exist_ok=True)
    if not options.report:
        status = _measure(options, output)
    return status | _report(options, output)


def _measure(options: argparse.Namespace, output: Path) -> int:
    """All parts, one after the other."""
    minutes = options.minutes or {"quick": 2.5, "whole": 8.0, "tiny": 8.0}[options.size]
    deadline, status = time.monotonic() + 60 * minutes, 0
    with tempfile.TemporaryDirectory() as cache:
        for part in options.parts:
            left = deadline - time.monotonic()
            share = 1.0 if part == options.parts[-1] else SHARES[part]
            status |= _run(part, options.size, output, max(10.0, left * share), Path(cache), options.resume)
    return status


def _run(part: str, size: str, output: Path, limit: float, cache: Path, resume: bool) -> int:
    """Run one part in its own process, ended shortly after its time is up; returns 1 if anything in it failed."""
    path = output / f"{part}.json"
    if not resume:
        path.unlink(missing_ok=True)
    print(f"{part}: at most {limit:.0f} s", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "one_gpu_parts", part, size, str(output.resolve()), str(limit)]
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92"),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "true" if part == "passes" else "false",
        "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "2"),
    }
    with (output / f"{part}.log").open("w") as log:
        process = subprocess.Popen(command, cwd=EXPERIMENTS, env=environment, stderr=log, stdout=log)
        try:
            code = process.wait(limit + 5)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
    found = json.loads(path.read_text()) if path.exists() else {"failed": [], "complete": False}
    failed = [of["case"] for of in found["failed"]]
    print(f"{part}: {len(found.get('cases', []))} cases, failed: {failed or 'none'}", file=sys.stderr, flush=True)
    if code:
        print((output / f"{part}.log").read_text()[-3000:], file=sys.stderr, flush=True)
    return int(bool(code or failed))


def _report(options: argparse.Namespace, output: Path) -> int:
    """Write the tables next to the results and, if requested, the page and the constants."""
    from one_gpu_parts import constants, gpu_page, pass_table
    from one_gpu_parts.gpu_measurements import Measured
    from one_gpu_parts.gpu_sizes import SIZES
    from vocabpp_jax.schedules.simulation.cost import load_gpu

    measured, size = Measured.read(output), SIZES[options.size]
    for path in pass_table.write(measured, size, output):
        print(f"wrote {path}", file=sys.stderr)
    if options.constants:
        found = constants.constants(measured, load_gpu(options.constants))
        if found is None:
            print("error: constants is given, and the passes or the overhead were not measured", file=sys.stderr)
            return 1
        constants.write(Path(options.constants), found[0])
    if options.docs:
        gpu_page.write(Path(options.docs), measured, size, load_gpu(options.gpu))
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/gpu", help="folder for PART.json and PART.log (default: runs/gpu)")
    parser.add_argument("--quick", action="store_const", dest="size", const="quick", default="whole",
                        help="only the most important parts, in two and a half minutes")  # fmt: skip
    parser.add_argument("--tiny", action="store_const", dest="size", const="tiny",
                        help="everything at a size that suits CPUs; the times are meaningless")  # fmt: skip
    parser.add_argument("--only", metavar="PARTS", help=f"of {','.join(PARTS)}")
    parser.add_argument("--skip", metavar="PARTS", default="", help="parts to leave out")
    parser.add_argument("--resume", action="store_true", help="keep the cases in OUTPUT and measure the rest")
    parser.add_argument("--report", action="store_true", help="measure nothing; write the tables from OUTPUT")
    parser.add_argument("--docs", metavar="PAGE", help="Markdown page to write, for example docs/gpu.md")
    parser.add_argument("--constants", metavar="FILE", help="GPU file whose constants are replaced by measured ones")
    parser.add_argument("--gpu", default="h100-80g", help="GPU of the cost model whose network is assumed")
    parser.add_argument("--minutes", type=float, help="time limit (default: 8, or 2.5 with --quick)")
    options = parser.parse_args(arguments)
    chosen = options.only.split(",") if options.only else list(PARTS)
    for name in [*chosen, *filter(None, options.skip.split(","))]:
        if name not in PARTS:
            parser.error(f"there is no part {name!r}; the parts are {', '.join(PARTS)}")
    options.parts = [part for part in PARTS if part in chosen and part not in options.skip.split(",")]
    if not options.parts:
        parser.error("skip leaves no part")
    if options.minutes is not None and options.minutes <= 0:
        parser.error(f"minutes is {options.minutes:g}; it must be above 0")
    return options


if __name__ == "__main__":
    sys.exit(main())
