"""Checkpoints that survive: canonical, so that any layout can read them; whole, or not there."""

from .canonical import Canonical, fingerprints
from .store import Damaged, Loaded, Writer, load, read_arrays, read_record, steps_in

__all__ = [
    "Canonical",
    "Damaged",
    "Loaded",
    "Writer",
    "fingerprints",
    "load",
    "read_arrays",
    "read_record",
    "steps_in",
]
