"""Compiles one step: :mod:`.compiling` request on standard input, the compiler's peak on standard output."""

from __future__ import annotations

import json
import sys

from command_line.options import ModelOptions, PipelineOptions
from command_line.parsing import or_fail
from memory import MemoryOptions, programs


def main() -> None:
    request = json.load(sys.stdin)
    options = MemoryOptions(
        gpu=request["gpu"],
        program=("step",),
        model=ModelOptions(**request["model"]),
        pipeline=PipelineOptions(**request["pipeline"]),
    )
    found = or_fail(lambda: programs(options).report("step"))
    print(json.dumps({"peak_bytes": found.peak_bytes, "seconds": found.compile_seconds}))


if __name__ == "__main__":
    main()
