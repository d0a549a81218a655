"""One pipeline's loss and every gradient, compared with plain autodiff of the same model on one device."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from command_line.options import ModelOptions, PipelineOptions
from vocabpp_jax import Pipeline, make_mesh, models
from vocabpp_jax.pipeline.mesh import all_devices

# Relative error of a gradient, in float32. For bfloat16, a bfloat16 reference sets the scale; see `allowed`.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """What to compare, and on which data."""

    mask_fraction: float = 0.0
    """Fraction of tokens that do not count in the loss."""
    seed: int = 0
    """Random seed for parameters and data."""
    model: ModelOptions = field(
        default_factory=lambda: ModelOptions(model="gpt-tiny", layers=8, hidden=32, heads=2, seq=12, vocab_size=101)
    )
    pipeline: PipelineOptions = field(
        default_factory=lambda: PipelineOptions(microbatches=8, microbatch_size=2, data_parallel=1)
    )


@dataclass(frozen=True)
class Parity:
    """The result: relative errors by parameter, and the activations that the running program held, by device."""

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
    """‖got - want‖ / ‖want‖; NaN if either is not finite."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))


def prepare(options: Case) -> Pipeline:
    """The pipeline of the options. Raises ValueError if it cannot be built."""
    if not 0 <= options.mask_fraction < 1:
        raise ValueError(f"mask_fraction is {options.mask_fraction}; it must be at least 0 and below 1")
    config = options.model.config()
    schedule = options.pipeline.build(config, mtp_depth=options.model.mtp_depth)
    x = options.pipeline
    mesh = make_mesh(x.stages, x.data_parallel or 1, all_devices()[: x.devices], tensor=x.tensor_parallel)
    return x.place(options.model.build(), schedule, mesh, config.dtype)


def data_of(options: Case, pipe: Pipeline) -> tuple[Any, dict[str, np.ndarray]]:
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


def compare(options: Case, pipe: Pipeline | None = None) -> Parity:
    """Run both sides of one configuration; ``pipe`` is its pipeline if it has been prepared."""
    pipe = pipe or prepare(options)
    canonical, batch = data_of(options, pipe)

    loss, grads, seen = pipe.jit(pipe.observed_value_and_grad)(pipe.shard(canonical), batch)
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


def reference(options: Case, canonical: Any, batch: dict[str, np.ndarray], dtype: str) -> tuple[Any, Any]:
    """Loss and gradients of one device, on the host.

    Fully masked microbatches pad the count to a round number, so that configurations that differ only in the pipeline
    share a compiled reference.
    """
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
    """The error explained by bfloat16: twice the worst error of one device computing in bfloat16."""
    return 2 * max(jax.tree.leaves(jax.tree.map(relative_error, rounded, exact)))
