"""Crash-safe checkpoints in a canonical form: readable under any layout, and either complete or absent."""

from .canonical import Canonical, fingerprints
from .folders import folder_path, in_bucket, steps_in
from .store import Damaged, Loaded, changes, load, read_arrays, read_record
from .writer import Writer

__all__ = [
    "Canonical",
    "Damaged",
    "Loaded",
    "Writer",
    "changes",
    "fingerprints",
    "folder_path",
    "in_bucket",
    "load",
    "read_arrays",
    "read_record",
    "steps_in",
]
