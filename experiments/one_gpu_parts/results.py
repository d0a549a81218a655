"""One part's results: a JSON file that is complete after every case."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Results:
    """A part's results so far, in ``OUTPUT/PART.json``.

    Attributes:
        path: the file; it is replaced after every change.
        deadline: when the part must be done, on the clock of :func:`time.monotonic`.
        found: ``cases`` in order of measurement, ``failed`` with tracebacks, ``left_out`` for lack of time, and the
            part's own fields.
    """

    path: Path
    deadline: float
    found: dict[str, Any] = field(
        default_factory=lambda: {"complete": False, "cases": [], "failed": [], "left_out": [], "seconds": 0.0}
    )
    began: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def say(self, line: str) -> None:
        """Print progress to standard error."""
        print(f"{self.path.stem} {time.monotonic() - self.began:6.1f} s: {line}", file=sys.stderr, flush=True)

    def note(self, **values: Any) -> None:
        """Add to the part's own fields."""
        self.found |= values
        self.write()

    def has(self, name: str) -> bool:
        """Whether an earlier run has this case."""
        return any(case["case"] == name for case in self.found["cases"])

    def go_on(self) -> None:
        """Keep the cases that an earlier run left in the file."""
        if self.path.exists():
            self.found |= {name: value for name, value in json.loads(self.path.read_text()).items() if name == "cases"}

    def case(self, name: str, run: Callable[[], dict[str, Any]], needs: float = 0.0) -> None:
        """Run a case and keep its result or traceback; leave it out if fewer than ``needs`` seconds are left."""
        if self.has(name):
            return
        if self.left < needs:
            self.leave_out([name])
            return
        found = self.attempt(name, run)
        if found is not None:
            self.found["cases"].append({"case": name} | found)
            self.write()

    def attempt(self, name: str, run: Callable[[], Any]) -> Any:
        """The result of ``run``, or None if it fails; the traceback is kept and the other cases still run."""
        began = time.monotonic()
        try:
            found = run()
        except Exception:
            self.found["failed"].append({"case": name, "traceback": traceback.format_exc()[-4000:]})
            self.write()
            self.say(f"{name}: FAILED\n{traceback.format_exc()[-3000:]}")
            return None
        self.say(f"{name}: {time.monotonic() - began:.1f} s")
        return found

    def leave_out(self, names: list[str]) -> None:
        """Record that there is no time for these cases."""
        self.found["left_out"] += names
        self.write()
        self.say(f"left out, {self.left:.0f} s left: {', '.join(names)}")

    def done(self) -> None:
        """Mark the part as complete."""
        self.note(complete=True)

    def write(self) -> None:
        """Replace the file."""
        self.found["seconds"] = time.monotonic() - self.began
        beside = self.path.with_suffix(".tmp")
        beside.write_text(json.dumps(self.found, indent=1) + "\n")
        os.replace(beside, self.path)


def environment() -> dict[str, Any]:
    """The measurement environment: device, driver, versions."""
    import jax

    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "driver": _driver(),
        "jax": jax.__version__,
        "jaxlib": jax.lib.__version__,
        "python": platform.python_version(),
        "runtime": getattr(device.client, "platform_version", "").replace("\n", " "),
    }


def _driver() -> str | None:
    path = Path("/proc/driver/nvidia/version")
    return path.read_text().splitlines()[0] if path.exists() else None
