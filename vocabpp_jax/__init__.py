"""Pipeline and vocabulary parallelism for large language models in JAX.

Names are imported lazily, so ``vocabpp_jax.schedules`` does not import jax.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import models, schedules
    from . import planning as plan
    from . import training as train
    from .pipeline import Layout, Model, Pipeline, make_mesh
    from .vocab import Loss

__all__ = ["Layout", "Loss", "Model", "Pipeline", "make_mesh", "models", "plan", "schedules", "train"]

_PACKAGES = {"models": ".models", "plan": ".planning", "schedules": ".schedules", "train": ".training"}
_PACKAGE_OF = {
    "Layout": ".pipeline",
    "Loss": ".vocab",
    "Model": ".pipeline",
    "Pipeline": ".pipeline",
    "make_mesh": ".pipeline",
}


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(_PACKAGES[name], __name__)
    if name in _PACKAGE_OF:
        return getattr(import_module(_PACKAGE_OF[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
