"""Give every command random or almost valid input and check the promise: it accepts the input, or says in one sentence
what is wrong and exits with status 2; no traceback, no crash, no hang.

    python experiments/fuzz.py --cases 2000

Nothing is trained or simulated beyond what checks the input. A failing case keeps its folder and can be rerun by its
number: --only tokenizers --first 17 --cases 1.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library's threads do not survive the fork of a case

from fuzzing.cases import Case, run_all
from fuzzing.families import FAMILIES, REPORTS, warm
from fuzzing.inputs import Inputs, make_inputs

from command_line.parsing import OptionalStr, fail, parse


@dataclass(frozen=True)
class FuzzOptions:
    """How many cases, and of which kinds."""

    cases: int = 2000
    """Total number of cases, spread evenly over the kinds."""
    first: int = 0
    """The number of the first case."""
    only: tuple[str, ...] = ()
    """Kinds of input; default all."""
    seed: int = 0
    """Random seed; determines every case."""
    jobs: int = 2
    """Cases to run at once."""
    limit_s: float = 120.0
    """Seconds after which a case counts as hanging."""
    show: bool = False
    """Print the answer to each case."""
    folder: OptionalStr = None
    """Folder for the cases; default: a new temporary folder."""


def cases(options: FuzzOptions, inputs: Inputs, folder: Path) -> Iterator[Case]:
    """The cases, cycling through the kinds."""
    kinds = options.only or tuple(FAMILIES)
    for number in range(options.first, options.first + -(-options.cases // len(kinds))):
        for kind in kinds[: options.cases - (number - options.first) * len(kinds)]:
            own = folder / f"{kind}-{number}"
            own.mkdir()
            random = Random(f"{options.seed} {kind} {number}")
            yield Case(f"{kind} {number}", own, FAMILIES[kind](random, inputs, own), report=kind in REPORTS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exits with status 1 if a case failed."""
    options = parse(FuzzOptions, __doc__, arguments)
    for kind in options.only:
        if kind not in FAMILIES:
            fail(f"only has {kind!r}; the kinds are {', '.join(FAMILIES)}")
    if options.cases < 1 or options.jobs < 1 or not options.limit_s > 0:
        fail("cases, jobs and limit_s must be above 0")
    folder = Path(options.folder or tempfile.mkdtemp(prefix="fuzz-")).resolve()
    inputs = Inputs(folder / "inputs")
    inputs.folder.mkdir(parents=True)
    os.environ["VOCABPP_CACHE"] = str(folder / "cache")
    warnings.filterwarnings("ignore", message=".*fork.*")
    # in its own process: jax does not survive a fork
    made = Case("inputs", inputs.folder, lambda: make_inputs(inputs.folder))
    made.start()
    while not made.ended(600):
        time.sleep(0.01)
    if made.wrong:
        print(made.wrong, file=sys.stderr)
        fail("the inputs to mutate cannot be created", status=1)
    warm()
    counts, wrong, slowest = Counter(), [], Case("", folder, lambda: None)
    for case in run_all(cases(options, inputs, folder), options.jobs, options.limit_s):
        kind = case.name.split()[0]
        counts[kind, "accepted" if case.accepted else "refused"] += 1
        slowest = max(case, slowest, key=lambda c: c.seconds)
        if options.show:
            print(f"{case.name}: {'accepted' if case.accepted else case.said}")
        if case.wrong:
            wrong.append(case)
            print(f"{case.name}, in {case.folder}: {case.wrong}", flush=True)
    for kind in options.only or FAMILIES:
        print(f"{kind:<18}{counts[kind, 'refused']:>6} refused{counts[kind, 'accepted']:>6} accepted")
    total = sum(counts.values())
    print(f"{total} cases, {len(wrong)} wrong; the slowest took {slowest.seconds:.1f} s ({slowest.name})")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
