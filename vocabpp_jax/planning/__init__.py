"""From GPUs and a model to a plan: every choice enumerated, what cannot fit dropped, the rest ranked by simulated time.

Imported as ``vocabpp_jax.plan``. Nothing is compiled and no GPU is needed; ``experiments/plan.py`` compiles the best.
"""

from __future__ import annotations

from collections.abc import Callable

from .footprint import MARGIN, Bytes
from .plans import Dropped, Plan, Ranked
from .ranking import Ranking
from .request import RESIDUALS, Choice, Request

__all__ = ["MARGIN", "RESIDUALS", "Bytes", "Choice", "Dropped", "Plan", "Ranked", "Ranking", "Request", "rank"]


def rank(request: Request, wanted: int = 10, say: Callable[[str], None] = lambda line: None) -> Ranked:
    """The ``wanted`` best plans of a request, best first; ``say`` is told of progress.

    Raises:
        ValueError: nothing can run, or nothing fits, with the nearest that would.
    """
    return Ranking(request, say).best(wanted)
