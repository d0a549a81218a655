"""The planner: enumerates every choice for a model on given GPUs, drops what cannot fit, ranks by simulated time.

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
    """The ``wanted`` best plans of a request, best first; ``say`` receives progress messages.

    Raises:
        ValueError: nothing can run or nothing fits; the message names the nearest request that would.
    """
    return Ranking(request, say).best(wanted)
