"""Reproduce the paper's tables and figures (arXiv 2411.05288), ours next to the published, and write docs/results.md.

    python experiments/reproduce.py                     everything; slow results are cached in runs/reproduce
    python experiments/reproduce.py --only table5       only one section
    python experiments/reproduce.py --skip memory       without the compiler for A100s, which needs jax's GPU packages

If interrupted, it resumes where it stopped.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing here is measured on a GPU

from rich.console import Console

from command_line.options import ClusterOptions
from command_line.parsing import fail, or_fail, parse
from paper import beyond, calibration, claims, convergence, layer_balance, memory_section, scaling, tables, waits
from paper.page import Files, Say, update

Section = Callable[[Files, Say], str]
SECTIONS: dict[str, tuple[str, Section]] = {
    "memory": ("Peak memory on A100s", memory_section.section),
    "calibration": ("The GPU model", calibration.section),
    "table5": ("Table 5: 1F1B", functools.partial(tables.section, 5)),
    "table6": ("Table 6: V-Half", functools.partial(tables.section, 6)),
    "claims": ("The headline claims", claims.section),
    "beyond": ("Schedules that the tables lack", beyond.section),
    "waits": ("Waiting, beside the published generators", waits.section),
    "ablation": ("Interlaced without its collectives", beyond.ablation_section),
    "table3": ("Table 3: scaling of the vocabulary layers", scaling.section),
    "table4": ("Table 4, Figure 2, Figure 3: what the vocabulary weighs", layer_balance.section),
    "convergence": ("Appendix E: convergence", convergence.section),
}
"""Sections by name, in execution order; memory first, since the tables show it."""
PAGE = (
    *("claims", "table5", "table6", "beyond", "waits", "ablation"),
    *("table3", "table4", "convergence", "memory", "calibration"),
)
"""The order on the page."""


@dataclass(frozen=True)
class ReproduceOptions:
    """What to reproduce, and where it goes."""

    only: tuple[str, ...] = ()
    """Sections to run, default all; the others stay on the page unchanged."""
    skip: tuple[str, ...] = ()
    """Sections to skip."""
    page: str = "docs/results.md"
    """The page to write; its tables and pictures go to the folder of that name next to it."""
    cache: str = "runs/reproduce"
    """Cache folder for slow results: compiled reports and loss curves."""


def chosen(options: ReproduceOptions) -> list[str]:
    """The sections to run. Raises ValueError for an unknown one."""
    for name in (*options.only, *options.skip):
        if name not in SECTIONS:
            raise ValueError(f"there is no section {name!r}; the sections are {', '.join(SECTIONS)}")
    return [name for name in SECTIONS if name in (options.only or SECTIONS) and name not in options.skip]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(ReproduceOptions, __doc__, arguments)
    names = or_fail(lambda: chosen(options))
    files, console = Files(Path(options.page), Path(options.cache)), Console()
    or_fail(lambda: ClusterOptions().join(simulated_devices=convergence.STAGES))
    started = time.monotonic()
    for n, name in enumerate(names, start=1):

        def say(line: str, name: str = name, n: int = n) -> None:
            console.print(f"{n}/{len(names)} {name}, {time.monotonic() - started:.0f} s: {line}", highlight=False)

        title, section = SECTIONS[name]
        say(title)
        try:
            body = or_fail(functools.partial(section, files, say))
            update(files.page, PAGE, {name: f"## {title} [{name}]\n\n{body}"})
        except OSError as problem:
            fail(f"{problem.filename} cannot be written: {problem.strerror}")
    console.print(f"written to {files.page} and {files.folder}", highlight=False)


if __name__ == "__main__":
    main()
