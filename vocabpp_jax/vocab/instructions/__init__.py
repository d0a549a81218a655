"""The vocabulary instructions: how each one updates a device's state."""

from .vocabulary_layer import flight
from .vocabulary_steps import VocabularySteps

__all__ = ["VocabularySteps", "flight"]
