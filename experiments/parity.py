"""Hold a pipeline's loss and every gradient against plain autodiff of the same model on one device.

The reference is independent code: the model's blocks one after the other, a plain softmax cross-entropy, and
``jax.value_and_grad``. Exits with status 1 where an error is past its tolerance. ``--all`` runs every schedule with
every method over many shapes, goes on where an earlier run stopped, and ends with a table.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from options import ClusterOptions, ModelOptions, OptionalStr, PipelineOptions, or_fail, parse, write_json
from vocabpp_jax import Pipeline, make_mesh, models, schedules
from vocabpp_jax.schedules.vocabulary import SHARDED

# Relative error of a gradient, in float32. In bfloat16 a reference in bfloat16 sets the scale; see `allowed`.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class ParityOptions:
    """What is compared, how, and where the result goes."""

    mask_fraction: float = 0.0
    """Fraction of tokens that do not count in the loss."""
    seed: int = 0
    """Decides parameters and data."""
    json: OptionalStr = None
    """File for the result as JSON, - for standard output."""
    all: bool = False
    """Run the whole matrix of schedules, methods, stages, microbatches and tied or untied tables."""
    results: str = "runs/parity.jsonl"
    """With --all: the file that results are added to, and read from when it goes on."""
    only: str = ""
    """With --all: only cases whose name this regular expression finds, for example "^1f1b vocab" or "p=3"."""
    jobs: int = 2
    """With --all: how many cases to run at once."""
    model: ModelOptions = field(
        default_factory=lambda: ModelOptions(model="gpt-tiny", layers=8, hidden=32, heads=2, seq=12, vocab_size=101)
    )
    pipeline: PipelineOptions = field(
        default_factory=lambda: PipelineOptions(microbatches=8, microbatch_size=2, data_parallel=1)
    )


@dataclass(frozen=True)
class Parity:
    """What came out: relative errors by parameter, and the activations that the running program held by device."""

    loss: float
    loss_error: float
    grad_errors: dict[str, float]
    tolerance: float
    in_flight: list[int]
    promised_in_flight: list[int]
    clobbered: bool

    @property
    def max_grad_error(self) -> float:
        return max(self.grad_errors.values())

    @property
    def holds(self) -> bool:
        """Whether every error is within its tolerance and the buffers held what the schedule says."""
        return (
            max(self.loss_error, self.max_grad_error) <= self.tolerance
            and not self.clobbered
            and self.in_flight == self.promised_in_flight
        )

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"max_grad_error": self.max_grad_error, "holds": self.holds}


def relative_error(got: Any, want: Any) -> float:
    """‖got - want‖ / ‖want‖; NaN where either is not finite."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))


def prepare(options: ParityOptions) -> Pipeline:
    """The pipeline of the options. Raises ValueError for what cannot be built."""
    if not 0 <= options.mask_fraction < 1:
        raise ValueError(f"mask_fraction is {options.mask_fraction}; it must be at least 0 and below 1")
    config = options.model.config()
    schedule = options.pipeline.build(config)
    x = options.pipeline
    mesh = make_mesh(x.stages, x.data_parallel or 1, jax.devices()[: x.devices], tensor=x.tensor_parallel)
    return Pipeline(options.model.build(), schedule, mesh, compute_dtype=config.dtype)


def data_of(options: ParityOptions, pipe: Pipeline) -> tuple[Any, dict[str, np.ndarray]]:
    """Random canonical parameters, none of them zero, and a random batch."""

    random = np.random.default_rng(options.seed)

    def value(path: tuple, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        around = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return (around + 0.1 * random.standard_normal(shape.shape)).astype(shape.dtype)

    canonical = jax.tree_util.tree_map_with_path(value, pipe.model.param_shapes())
    m, b = pipe.schedule.m, options.pipeline.microbatch_size * pipe.mesh.shape["data"]
    shape = (m, b, options.model.config().seq)
    tokens, labels = (random.integers(0, pipe.model.vocab_size, shape, dtype=np.int32) for _ in range(2))
    mask = (random.random(shape) >= options.mask_fraction).astype(np.float32)
    return canonical, {"tokens": tokens, "labels": labels, "mask": mask}


def compare(options: ParityOptions) -> Parity:
    """Runs both sides of one configuration."""
    pipe = prepare(options)
    canonical, batch = data_of(options, pipe)

    loss, grads, seen = jax.jit(pipe.observed_value_and_grad)(pipe.shard(canonical), batch)
    grads, (want_loss, want) = (
        pipe.layout.unpack(jax.device_get(grads)),
        reference(options, canonical, batch, "float32"),
    )
    errors = jax.tree.map(relative_error, grads, want)
    tolerance = TOLERANCE
    if pipe.compute_dtype == "bfloat16":
        tolerance = allowed(reference(options, canonical, batch, "bfloat16"), (want_loss, want))
    return Parity(
        loss=float(loss),
        loss_error=relative_error(loss, want_loss),
        grad_errors={jax.tree_util.keystr(k): e for k, e in jax.tree_util.tree_leaves_with_path(errors)},
        tolerance=tolerance,
        in_flight=np.max(seen["in_flight"], axis=0).tolist(),
        promised_in_flight=list(pipe.program.in_flight),
        clobbered=bool(np.any(seen["clobbered"])),
    )


def reference(options: ParityOptions, canonical: Any, batch: dict[str, np.ndarray], dtype: str) -> tuple[Any, Any]:
    """Loss and gradients of one device, on the host. Microbatches that do not count fill up a round number of them,
    so that configurations which differ only in the pipeline share a compiled reference."""
    m = len(batch["tokens"])
    fill = -m % 20
    batch = {name: np.pad(array, ((0, fill), (0, 0), (0, 0))) for name, array in batch.items()}
    compiled = compiled_reference(options.model, batch["tokens"].shape, dtype)
    return jax.device_get(compiled(canonical, batch))


@functools.cache
def compiled_reference(options: ModelOptions, shape: tuple[int, int, int], dtype: str) -> Any:
    """Plain value and gradient of the model's loss."""
    model = options.build()

    def loss(canonical: Any, batch: dict[str, jax.Array]) -> jax.Array:
        return models.reference_loss(model, canonical, **batch, dtype=dtype)

    tokens = jax.ShapeDtypeStruct(shape, np.int32)
    batch = {"tokens": tokens, "labels": tokens, "mask": jax.ShapeDtypeStruct(shape, np.float32)}
    return jax.jit(jax.value_and_grad(loss)).lower(model.param_shapes(), batch).compile()


def allowed(rounded: tuple, exact: tuple) -> float:
    """What bfloat16 explains: twice the worst error that one device makes when it computes in bfloat16."""
    return 2 * max(jax.tree.leaves(jax.tree.map(relative_error, rounded, exact)))


# --- the whole matrix ------------------------------------------------------------------------------------------------


def combinations() -> list[tuple[str, str]]:
    """Every schedule with every method that it takes."""
    return [(schedule, method) for schedule in schedules.SCHEDULES for method in schedules.methods_of(schedule)]


def matrix() -> Iterator[ParityOptions]:
    """Every combination of schedule and method that there is, over stages, microbatches and tied tables."""
    for schedule, method in combinations():
        for p in (1, 2, 3, 4, 8):
            for m in sorted({1, p - 1, p, 2 * p + 1, 3 * p} - {0}):
                for tied in (False, True):
                    yield case(schedule, method, p, m, tied)
        yield case(schedule, method, 4, 5, False, data=2)
        if method in SHARDED:
            for p, m in itertools.product((2, 4), (1, 5)):
                yield case(schedule, method, p, m, False, overlap=False)
    for schedule, method, p, tied in itertools.product(
        ("1f1b", "v-half"), ("vocab-1", "vocab-2"), (2, 4), (False, True)
    ):
        for model, loss in itertools.product(ARCHITECTURES, LOSSES):
            yield case(schedule, method, p, 3, tied, model=model, loss=loss)
        for model in ARCHITECTURES:
            yield case(schedule, method, p, 3, tied, model=model, tensor=2)


ARCHITECTURES = ("gpt-tiny", "llama-tiny", "qwen-tiny", "gemma-tiny")
LOSSES = ((), ("soft_cap",), ("z_loss",), ("label_smoothing",), ("soft_cap", "z_loss", "label_smoothing"))
_EXTENSIONS = {"soft_cap": 2.0, "z_loss": 0.01, "label_smoothing": 0.1}


def case(
    schedule: str,
    method: str,
    p: int,
    m: int,
    tied: bool,
    data: int = 1,
    *,
    overlap: bool = True,
    model: str = "gpt-tiny",
    loss: tuple[str, ...] = (),
    tensor: int = 1,
) -> ParityOptions:
    """One small configuration: a prime vocabulary, one layer a stage, some tokens masked where tied."""
    layers = 2 * p if schedule.startswith(("v-", "inter")) or method == "redis" else p
    return ParityOptions(
        mask_fraction=0.25 if tied else 0.0,
        model=ModelOptions(
            model=model, layers=layers, hidden=16, heads=2, seq=6, vocab_size=61,
            tie_embeddings=tied, untie_embeddings=not tied,
            **{name: _EXTENSIONS[name] for name in loss},
        ),
        pipeline=PipelineOptions(
            schedule=schedule, method=method, stages=p, microbatches=m, microbatch_size=2, data_parallel=data,
            tensor_parallel=tensor, no_overlap=not overlap,
        ),
    )  # fmt: skip


def name_of(options: ParityOptions) -> str:
    """A case's name in the results and the table."""
    x = options.pipeline
    tied = "tied" if options.model.tie_embeddings else "untied"
    name = f"{x.schedule} {x.method} p={x.stages} m={x.microbatches} {tied} data={x.data_parallel}"
    name += f" tensor={x.tensor_parallel}" if x.tensor_parallel > 1 else ""
    name += " no overlap" if x.no_overlap else ""
    name += f" {options.model.model}" if options.model.model != "gpt-tiny" else ""
    return name + "".join(f" {field}" for field in ModelOptions.LOSS if getattr(options.model, field))


def run_all(path: Path, only: str, jobs: int, console: Console) -> bool:
    """Runs what the results file lacks; prints the table of all; says whether all of it holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {r["case"]: r for r in map(json.loads, path.read_text().splitlines())} if path.exists() else {}
    cases = [options for options in matrix() if re.search(only, name_of(options))]
    missing = [options for options in cases if name_of(options) not in done]
    started = time.monotonic()
    # Threads do not help a compiler of small programs; processes do.
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_simulate_devices) as pool:
        for n, (options, result) in enumerate(zip(missing, pool.map(_compare, missing), strict=True), start=1):
            name = name_of(options)
            done[name] = {"case": name} | result.as_json()
            with path.open("a") as file:
                file.write(json.dumps(done[name]) + "\n")
            left = (time.monotonic() - started) / n * (len(missing) - n) / 60
            verdict = "" if result.holds else "  FAILS"
            console.print(f"{n}/{len(missing)} {name}: {result.max_grad_error:.1e}{verdict}, {left:.0f} min left")
    table = Table("schedule", "method", "cases", "largest gradient error", "in flight as promised", "hold")
    for schedule, method in combinations():
        of = [r for c, r in done.items() if c.startswith(f"{schedule} {method} ")]
        if not of:
            continue
        table.add_row(
            schedule,
            method,
            str(len(of)),
            f"{max(r['max_grad_error'] for r in of):.1e}",
            "yes" if all(r["in_flight"] == r["promised_in_flight"] for r in of) else "no",
            f"{sum(r['holds'] for r in of)}/{len(of)}",
        )
    console.print(table)
    return all(done[name_of(options)]["holds"] for options in cases)


def _simulate_devices() -> None:
    ClusterOptions().join(8)


def _compare(options: ParityOptions) -> Parity:
    result = compare(options)
    jax.clear_caches()
    return result


# --- the command -----------------------------------------------------------------------------------------------------


def show(result: Parity, console: Console) -> None:
    """The table of errors, worst first."""
    table = Table("parameter", "relative error")
    for name, error in sorted(result.grad_errors.items(), key=lambda item: -item[1])[:20]:
        table.add_row(name, f"{error:.2e}")
    console.print(table)
    if len(result.grad_errors) > 20:
        console.print(f"and {len(result.grad_errors) - 20} parameters with smaller errors")
    console.print(f"loss {result.loss:.6f}, relative error {result.loss_error:.2e}; tolerance {result.tolerance:.1e}")
    console.print(f"in flight, by device: {result.in_flight}, promised {result.promised_in_flight}")
    console.print("[bold green]equal[/]" if result.holds else "[bold red]NOT equal[/]")


def main() -> None:
    options = parse(ParityOptions, __doc__)
    console = Console(stderr=options.json == "-")
    if options.all:
        sys.exit(not run_all(Path(options.results), options.only, options.jobs, console))
    ClusterOptions().join(options.pipeline.devices)
    or_fail(lambda: prepare(options).program)
    result = compare(options)
    show(result, console)
    write_json(options.json, result.as_json(), indent=2)
    sys.exit(not result.holds)


if __name__ == "__main__":
    main()
