"""Compare a pipeline's loss and every gradient with plain autodiff of the same model on one device.

The reference is independent code: the model's blocks one after the other, a plain softmax cross-entropy, and
``jax.value_and_grad``. Exits with status 1 if an error exceeds its tolerance. ``--all`` runs every schedule with every
method over many shapes and ends with a table. It resumes where an earlier run stopped, and repeats a case whose program
has changed since.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from command_line.options import ClusterOptions
from command_line.parsing import OptionalStr, or_fail, parse, write_json
from parity_check.parity_compare import Case, Parity, compare, prepare
from parity_check.parity_matrix import run_all, summary
from reports.markdown import insert_table, table


@dataclass(frozen=True)
class ParityOptions(Case):
    """What to compare, how, and where the result goes."""

    json: OptionalStr = None
    """File for the result as JSON, - for standard output."""
    all: bool = False
    """Run the whole matrix of schedules, methods, stages, microbatches and tied or untied tables."""
    results: str = "runs/parity.jsonl"
    """With --all: file that results are appended to and resumed from."""
    only: str = ""
    """With --all: only cases whose name matches this regular expression, for example "^1f1b vocab" or "p=3"."""
    jobs: int = 2
    """With --all: how many cases to run at once."""
    docs: OptionalStr = None
    """With --all: Markdown page whose table of the matrix is replaced."""


def show(result: Parity, console: Console) -> None:
    """The table of errors, worst first."""
    table = Table("parameter", "relative error")
    for name, error in sorted(result.grad_errors.items(), key=lambda item: -item[1])[:20]:
        table.add_row(name, f"{error:.2e}")
    console.print(table)
    if len(result.grad_errors) > 20:
        console.print(f"and {len(result.grad_errors) - 20} parameters with smaller errors")
    console.print(f"loss {result.loss:.6f}, relative error {result.loss_error:.2e}; tolerance {result.tolerance:.1e}")
    console.print(f"in flight, by device: {result.in_flight}, promised {result.promised_in_flight}")
    console.print("[bold green]equal[/]" if result.holds else "[bold red]NOT equal[/]")


def show_all(results: list[dict[str, Any]], console: Console, docs: str | None) -> None:
    """Print the table of the matrix, and write it to a page if given."""
    rows = summary(results)
    if not rows:
        return
    shown = Table(*rows[0])
    for row in rows:
        shown.add_row(*row.values())
    console.print(shown)
    if docs:
        or_fail(lambda: insert_table(Path(docs), "parity", table(rows)))


def main() -> None:
    options = parse(ParityOptions, __doc__)
    console = Console(stderr=options.json == "-")
    if options.all:
        results = run_all(Path(options.results), options.only, options.jobs, console)
        show_all(results, console, options.docs)
        write_json(options.json, results)
        sys.exit(not all(result["holds"] for result in results))
    or_fail(lambda: ClusterOptions().join(options.pipeline.devices))
    or_fail(lambda: prepare(options).program)
    result = compare(options)
    show(result, console)
    write_json(options.json, result.as_json(), indent=2)
    sys.exit(not result.holds)


if __name__ == "__main__":
    main()
