"""Cost-model constants from measurements: kernel rates directly, traffic of passes by least squares.

What one GPU cannot tell keeps the file's value: the network, and how much collectives slow down overlapping passes.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np

from reports.least_squares import Constants, gauss_newton
from vocabpp_jax import models
from vocabpp_jax.schedules.simulation.cost import GPU, Cost

from .gpu_measurements import Measured

FITTED = {"layer_traffic": 50.0, "logit_traffic": 12.0, "weight_traffic": 10.0, "launch": 5e-5, "edge_traffic": 20.0}
"""Fitted by least squares, starting from these values."""
LARGE = 2048 * 3072 * 12_288  # of a matrix product: smaller ones do not reach the rate of large ones
LONG = 1e-3  # seconds from which a pass counts fully; shorter ones matter less in an iteration


def constants(measured: Measured, gpu: GPU) -> tuple[dict[str, float], float] | None:
    """The constants, and the RMS error over passes of a millisecond or more; None for what was not measured."""
    direct = _rates(measured, gpu)
    if direct is None or not compared(measured, gpu):
        return None
    reached = dataclasses.replace(gpu, **direct)

    def residuals(at: Constants) -> np.ndarray:
        rows = compared(measured, dataclasses.replace(reached, **at))
        return np.array([min(1.0, s / LONG) ** 0.5 * np.log(model / s) for _, s, model in rows])

    fitted, _ = gauss_newton(residuals, FITTED, iterations=30)
    rows = compared(measured, dataclasses.replace(reached, **fitted))
    long = [np.log(model / s) for _, s, model in rows if s >= LONG]
    return direct | fitted, float(np.sqrt(np.mean(np.square(long))))


def _rates(measured: Measured, gpu: GPU) -> dict[str, float] | None:
    """Kernel rates relative to the data sheet, and the cost of a loop."""
    kernels = {case["case"]: case["per_second"] for case in measured.cases("passes") if "per_second" in case}
    copies = [rate for name, rate in kernels.items() if name == "copy"]
    large = [rate for name, rate in kernels.items() if name.startswith("product") and _size(name) >= LARGE]
    attention = [r for name, r in kernels.items() if name.startswith("attention") and "backward" not in name]
    loops = measured.cases("overhead", kind="loops", command_buffers="default")
    if not (copies and large and attention and loops):
        return None
    return {
        "matmul_efficiency": float(np.mean(large)) / gpu.peak_flops,
        "half_size": 0.0,  # no product timed here is smaller than a shard of the published models
        "attention_efficiency": float(np.mean(attention)) / gpu.peak_flops,
        "traffic_efficiency": copies[0] / gpu.memory_bandwidth,
        "overhead": 1e-6 * loops[0]["skipped_us"],
    }


def _size(name: str) -> int:
    return int(np.prod([int(n) for n in re.findall(r"\d+", name)]))


def compared(measured: Measured, gpu: GPU) -> list[tuple[str, float, float]]:
    """Name, measured and modeled seconds of every pass.

    Left out are the three-barrier reference, which keeps float32 logits, and whole tables under a sharded method, which
    nobody runs.
    """
    found: list[tuple[str, float, float]] = []
    for case in measured.cases("passes"):
        whole = case.get("rows") == case.get("vocab_size")
        if "model" not in case or case["method"] == "vocab-naive" or (whole and case["method"].startswith("vocab")):
            continue
        modelled = _layers(case, gpu) if "F" in case["us"] else _vocabulary(case, gpu)
        us = case["us"] | ({"T": case["us"]["T"] + case["us"].get("C1", 0.0)} if "T" in case["us"] else {})
        found += [(f"{case['case']}: {name}", 1e-6 * us[name], s) for name, s in modelled.items() if us[name] > 0]
    return found


def _cost(case: dict[str, Any], gpu: GPU) -> Cost:
    config = models.named(case["model"], seq=case["seq"], vocab_size=case["vocab_size"])
    return Cost(models.cost_sizes(config), gpu)


def _layers(case: dict[str, Any], gpu: GPU) -> dict[str, float]:
    forward, inputs, weights = _cost(case, gpu).layer()
    each = {"F": forward, "B": inputs, "W": weights} if "W" in case["us"] else {"F": forward, "B": inputs + weights}
    return {name: case["layers"] * s + gpu.launch for name, s in each.items()}


def _vocabulary(case: dict[str, Any], gpu: GPU) -> dict[str, float]:
    passes = _cost(case, gpu).vocabulary(case["rows"], early=case["method"] == "vocab-2")
    return {name: passes[name] for name in ("S", "T", "H") if name in case["us"]}


def write(path: Path, found: dict[str, float]) -> None:
    """Replace the constants in a GPU's file, and nothing else.

    Raises:
        ValueError: the file lacks one of them.
    """
    text = path.read_text()
    for name, value in found.items():
        text, count = re.subn(rf"(?m)^({name} = )[^ #\n]+", rf"\g<1>{value:.3g}", text)
        if count != 1:
            raise ValueError(f"{path} has {count} lines for {name!r}; it needs one")
    path.write_text(text)
