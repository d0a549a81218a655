"""Turns tyro's error boxes with hints into one sentence."""

from __future__ import annotations

import re

_LONGEST = 500  # characters


def sentence_of(box: str) -> str:
    """The sentence in a box that tyro wrote to standard error."""
    lines = [re.sub(r"^[│|]|[│|]$", "", line.rstrip()).rstrip() for line in box.splitlines()]
    rules = [n for n, line in enumerate(lines) if line.strip() and not line.strip().strip("─-")]
    titles = [n for n, line in enumerate(lines) if line.startswith(("╭", "╰", "+"))] + [n - 1 for n in rules if n == 1]
    end = next((n for n in rules if n > 1), len(lines))
    body = [line for n, line in enumerate(lines[:end]) if n not in (*rules, *titles)]
    said = "\n".join(line.strip() for line in body)
    if said.startswith("Missing from"):  # missing names are indented once, their descriptions twice
        depth = min((len(line) - len(line.lstrip()) for line in body[1:] if line.strip()), default=0)
        names = [line.strip() for line in body[1:] if line.strip() and len(line) - len(line.lstrip()) == depth]
        return f"{', '.join(names)} must be given; --help explains"
    first, _, causes = said.partition("\n\n")
    if "no type matching" in first and (
        cause := re.findall(r"^- (?!<class 'NoneType'>).*?: (.*)$", causes, re.MULTILINE)
    ):
        first = first.split(": no type matching")[0] + f": {cause[-1]}"
    first = " ".join(first.split())
    return first if len(first) <= _LONGEST else f"{first[:_LONGEST]}..."
