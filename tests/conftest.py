"""Every test process simulates eight CPU devices; this stands before anything that imports JAX."""

import os
import sys
from pathlib import Path

from hypothesis import settings

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

# The scripts import `options` from beside them.
sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))

# The same examples on every machine, however slow it is.
settings.register_profile("project", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("project")
