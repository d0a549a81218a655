"""The results page, its tables and pictures: one part per section, each replaced when its section runs again."""

from __future__ import annotations

import csv
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from reports.markdown import Row

Say = Callable[[str], None]

METHOD_COLORS = {
    "baseline": "#bbbbbb",
    "redis": "#ccbb44",
    "vocab-1": "#4477aa",
    "vocab-2": "#228833",
    "interlaced": "#ee6677",
}


@dataclass(frozen=True)
class Files:
    """Where results go: ``page``, and the folder of the same name next to it for tables and pictures; ``cache`` holds
    slow results."""

    page: Path
    cache: Path

    @property
    def folder(self) -> Path:
        """The folder for tables and pictures."""
        return self.page.with_suffix("")

    def csv(self, name: str, rows: Sequence[Row]) -> str:
        """Write a table; returns its link."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows({key: _number(value) for key, value in row.items()} for row in rows)
        return f"[{path.name}]({self.folder.name}/{path.name})"

    def picture(self, name: str, figure: Figure, alt: str) -> str:
        """Write a picture; returns the Markdown that shows it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.png"
        figure.savefig(path, dpi=110, metadata={"Software": None})
        return f"![{alt}]({self.folder.name}/{path.name})"

    def read(self, name: str) -> list[dict[str, str]]:
        """A table that an earlier section wrote; ValueError if it has not."""
        path = self.folder / f"{name}.csv"
        if not path.exists():
            raise ValueError(f"{path} is not there; run the section that writes it first: --only {name}")
        with path.open() as file:
            return list(csv.DictReader(file))


def _number(value: Any) -> Any:
    """Floats with five significant digits."""
    return f"{value:.5g}" if isinstance(value, float) else "" if value is None else value


def canvas(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Figure, Any]:
    """A figure and its axes without boxes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.ravel():
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes if rows > 1 else axes[0] if columns > 1 else axes[0, 0]


HEAD = """# Results

The tables and figures of [arXiv 2411.05288](https://arxiv.org/abs/2411.05288) that can be reproduced, ours next to
the published ones. This page is written by

    python experiments/reproduce.py

To rewrite one section, add `--only SECTION` with the name in brackets in its heading. Every section says how its
numbers were obtained:

* **measured**: run on the named hardware;
* **compiled**: read from the real program as compiled for the named hardware, without running it;
* **simulated**: pass times from a model of the GPU, combined by the event simulator ([simulator.md](simulator.md));
* **computed**: arithmetic on sizes.

The published numbers are in [paper/](../docs/paper): memory in GB of 1024 MiB, MFU in percent. On eight GPUs, the
published MFU of Table 5 is relative to a peak of 320 TFLOP/s, not 312, and so is ours in that table.
"""


def _wrapped(body: str) -> str:
    """Wrap paragraphs at 120 columns; headings, tables and pictures are unchanged."""
    parts = body.strip().split("\n\n")
    prose = [not part.startswith(("#", "|", "!")) for part in parts]
    fill = {"width": 120, "break_long_words": False, "break_on_hyphens": False}
    lines = [textwrap.fill(part, **fill) if it else part for part, it in zip(parts, prose, strict=True)]
    return "\n\n".join(lines) + "\n"


def update(page: Path, order: Sequence[str], parts: Mapping[str, str]) -> None:
    """Write the page: the given parts are replaced, the others kept, in order."""
    old = page.read_text() if page.exists() else ""
    kept = {name: body for name, body in re.findall(r"<!-- (\w+) -->\n(.*?)<!-- end -->", old, re.DOTALL)}
    kept |= {name: _wrapped(body) for name, body in parts.items()}
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(HEAD + "".join(f"\n<!-- {name} -->\n{kept[name]}<!-- end -->\n" for name in order if name in kept))
