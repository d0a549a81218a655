"""Reads the parts' measurements back from their files: pass times by case, and durations for the simulator."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vocabpp_jax import models
from vocabpp_jax.schedules import COLLECTIVES, Durations, Schedule, build
from vocabpp_jax.schedules.simulation.cost import GPU, Cost, stage_layers

PARTS = ("parity", "overhead", "passes", "stages", "torch")
_VOCABULARY_OF = {"redis": "baseline", "interlaced": "vocab-1"}  # methods that share another's vocabulary passes
_OFTEN = ("S", "S1", "S2", "T", "H", "IF", "IB", "G")


@dataclass(frozen=True)
class Measured:
    """The contents of the parts' files; a missing part has no cases."""

    parts: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Measured:
        """Read a folder."""
        files = {part: folder / f"{part}.json" for part in PARTS}
        return cls({part: json.loads(path.read_text()) for part, path in files.items() if path.exists()})

    def cases(self, part: str, **where: Any) -> list[dict[str, Any]]:
        """The cases of a part with the given field values."""
        found = self.parts.get(part, {}).get("cases", [])
        return [case for case in found if all(case.get(name) == value for name, value in where.items())]

    def environment(self, part: str) -> dict[str, Any]:
        """The environment a part ran in."""
        return self.parts.get(part, {}).get("environment", {})

    # --- passes ------------------------------------------------------------------------------------------------------

    def layers(self, model: str, seq: int, name: str, layers: float, *, split: bool = False) -> float | None:
        """Seconds of F, B or W of ``layers`` layers: a line through the measurements of one layer and of a stage."""
        schedule = "zb-h1" if split else "1f1b"
        times = {
            case["layers"]: 1e-6 * case["us"][name]
            for case in self.cases("passes", model=model, seq=seq, schedule=schedule, method="baseline")
            if name in case["us"]
        }
        if len(times) < 2:
            return None
        (one, most) = min(times), max(times)
        each = (times[most] - times[one]) / (most - one)
        return max(0.0, times[one] + (layers - one) * each) if layers else 0.0

    def vocabulary(self, model: str, seq: int, V: int, method: str, rows: int) -> dict[str, float] | None:
        """Seconds of the vocabulary passes for a table of ``rows`` rows; T includes what C1 computes."""
        method = _VOCABULARY_OF.get(method, method)
        found = self.cases("passes", model=model, seq=seq, vocab_size=V, method=method, rows=rows)
        found = [case for case in found if "F" not in case["us"]]
        if not found:
            return None
        us = {name: 1e-6 * max(0.0, value) for name, value in found[0]["us"].items()}
        return us | ({"T": us["T"] + us.get("C1", 0.0)} if "T" in us else {})

    def durations(self, model: str, p: int, seq: int, V: int, schedule: Schedule, gpu: GPU) -> Durations | None:
        """All durations for the simulator: passes as measured, transfers and collectives from the GPU's file."""
        rows = -(-V // p) if schedule.sharded else V
        passes = self.vocabulary(model, seq, V, schedule.method, rows)
        config = models.named(model, seq=seq, vocab_size=V)
        split = schedule.splits_backward
        times: dict[str, Any] = {}
        for name in ("F", "B", "W") if split else ("F", "B"):
            stages = [self.layers(model, seq, name, n, split=split) for n in stage_layers(schedule, config.layers)]
            times[name] = tuple(stages)
            if passes is None or None in stages:
                return None
        times |= {name: passes.get(name, 0.0) for name in _OFTEN} | ({} if split else {"W": 0.0})
        network = Cost(models.cost_sizes(config), gpu).durations(schedule)
        names = (*COLLECTIVES, "transfer", "overhead")
        return Durations(**times, **{name: getattr(network, name) for name in names})

    def products(self) -> Iterator[float]:
        """FLOP/s of the matrix products."""
        return (case["per_second"] for case in self.cases("passes") if case["case"].startswith("product"))


def schedule_of(method: str, model: str, p: int, m: int, seq: int, V: int) -> Schedule:
    """1F1B of a model with a method; redis with its published layers."""
    from vocabpp_jax.schedules.layers import redistributed

    config, counts = models.named(model, seq=seq, vocab_size=V), None
    if method == "redis":
        rho = models.head_flops(config) / models.layer_flops(config)
        counts = redistributed("published", layers=config.layers, stages=p, rho=rho)
    return build("1f1b", method, p=p, m=m, layer_counts=counts)
