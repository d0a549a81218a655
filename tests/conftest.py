"""Every test process simulates eight CPU devices; this stands before anything that imports JAX."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# The scripts import their packages from beside them.
sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))

from parity_check.fast_compile import FAST_COMPILE  # noqa: E402

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{FAST_COMPILE} --xla_force_host_platform_device_count=8"

GPU_PACKAGES = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
needs_gpu_packages = pytest.mark.skipif(not GPU_PACKAGES, reason="jax's GPU packages are not installed")

# The same examples on every machine, however slow it is.
settings.register_profile("project", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("project")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of a test that is ``sampled(k)``, all cases but every k-th are thorough: not in the default command."""
    seen = {}
    for item in items:
        if sampled := item.get_closest_marker("sampled"):
            test = (item.path, item.originalname)
            seen[test] = seen.get(test, -1) + 1
            if seen[test] % sampled.args[0]:
                item.add_marker(pytest.mark.thorough)
