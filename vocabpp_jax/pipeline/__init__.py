"""Runs a model under a pipeline schedule on a mesh, and computes its loss and gradients.

Names are imported lazily, so each module of this package can be imported without the others.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .layout import Layout
    from .mesh import DATA, PIPE, make_mesh
    from .model_interface import Model, Tail, TensorSplit
    from .pipeline import Batch, Pipeline
    from .tensor import TENSOR

__all__ = ["DATA", "PIPE", "TENSOR", "Batch", "Layout", "Model", "Pipeline", "Tail", "TensorSplit", "make_mesh"]

_MODULE_OF = {
    "Batch": "pipeline",
    "DATA": "mesh",
    "Layout": "layout",
    "Model": "model_interface",
    "PIPE": "mesh",
    "Pipeline": "pipeline",
    "TENSOR": "tensor",
    "Tail": "model_interface",
    "TensorSplit": "model_interface",
    "make_mesh": "mesh",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
