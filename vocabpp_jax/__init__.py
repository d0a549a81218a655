"""Pipeline and vocabulary parallelism for large language models in JAX."""

from . import models, schedules, train
from .layout import Layout
from .model import Model
from .pipeline import Pipeline, make_mesh
from .vocab import Loss

__all__ = ["Layout", "Loss", "Model", "Pipeline", "make_mesh", "models", "schedules", "train"]
