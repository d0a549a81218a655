"""One part in its own process: ``python -m one_gpu_parts PART SIZE OUTPUT SECONDS``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from . import gpu_parity, loop_overhead, pass_times, stages, torch_layers
from .gpu_sizes import SIZES
from .results import Results, environment

PARTS = {
    "parity": gpu_parity.measure,
    "overhead": loop_overhead.measure,
    "passes": pass_times.measure,
    "stages": stages.measure,
    "torch": torch_layers.measure,
}


def main() -> None:
    name, size, output, limit = sys.argv[1:]
    results = Results(Path(output) / f"{name}.json", time.monotonic() + float(limit))
    results.go_on()
    results.note(size=size)
    if name not in ("stages", "torch"):  # these leave the device to their own subprocesses, or to PyTorch
        results.note(environment=environment())
    PARTS[name](SIZES[size], results)


if __name__ == "__main__":
    main()
