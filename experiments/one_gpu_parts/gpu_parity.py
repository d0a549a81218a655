"""Loss and all gradients of one stage on this device, compared with float32 autodiff on the host's CPU."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jax
import numpy as np

from vocabpp_jax import Pipeline, make_mesh, models, schedules
from vocabpp_jax.models.config import Config

from .gpu_sizes import Size
from .results import Results
from .timing import Compiler

METHODS = ("vocab-2", "vocab-1", "baseline", "vocab-naive", "interlaced")
TOLERANCE = 1e-5  # relative, in float32
MICROBATCHES, SEQUENCES = 4, 2


@dataclass(frozen=True)
class Case:
    """What is compared.

    ``precision`` is that of float32 products: ``default`` lets a GPU round them to TF32 and is reported without a
    verdict.
    """

    method: str
    dtype: str = "float32"
    attention: str = "xla"
    schedule: str = "1f1b"
    model: str = "gpt-tiny"
    precision: str = "highest"
    documents: bool = False
    seq: int = 128
    shape: tuple[tuple[str, int], ...] = field(default=(("layers", 2), ("hidden", 128), ("heads", 2)))

    @property
    def key(self) -> str:
        """The case's name in the results."""
        more = [self.model] * (self.model != "gpt-tiny") + ["documents"] * self.documents
        more += [f"s={self.seq}"] * (self.seq != 128) + ["TF32 allowed"] * (self.precision == "default")
        return ", ".join([f"{self.schedule} {self.method}", self.dtype, self.attention, *more])

    def config(self) -> Config:
        """The model as the pipeline computes it."""
        return dataclasses.replace(self.plain(), dtype=self.dtype, attention=self.attention)

    def plain(self) -> Config:
        """The model as the reference computes it."""
        return models.named(self.model, **dict(self.shape), seq=self.seq, vocab_size=1000, attention="xla")


def cases(size: Size) -> list[Case]:
    """Every method in every dtype and attention, then other schedules, models, documents, lengths."""
    if size.parity == "tiny":
        shape = (("layers", 2), ("hidden", 16), ("heads", 2))
        return [dataclasses.replace(c, shape=shape, seq=16) for c in (Case("vocab-2"), Case("vocab-1", "bfloat16"))]
    found = [Case(method) for method in METHODS]
    found += [Case(method, "bfloat16", attention) for attention in ("cudnn", "xla") for method in METHODS]
    if size.parity == "quick":
        return [*found[:5], *found[5:7], found[10]]
    llama = dict(model="llama-tiny", shape=(("layers", 2), ("hidden", 128), ("heads", 4), ("kv_heads", 2)))
    llama["shape"] += (("head_size", 64), ("inner", 256))
    found += [
        Case("vocab-2", precision="default"),
        Case("vocab-2", schedule="zb-h1"),
        Case("vocab-1", "bfloat16", "cudnn", schedule="zb-h1"),
        Case("vocab-2", "bfloat16", "cudnn", schedule="v-half"),
        Case("vocab-2", documents=True),
        Case("vocab-2", "bfloat16", "cudnn", documents=True),
        Case("vocab-2", "bfloat16", "cudnn", seq=127),
        Case("vocab-2", **llama),
        Case("vocab-2", "bfloat16", "cudnn", **llama),
    ]
    return found


def measure(size: Size, results: Results) -> None:
    """Compare all cases; they are compiled concurrently."""
    wanted = [case for case in cases(size) if not results.has(case.key)]
    host = jax.devices("cpu")[0]
    with Compiler() as compiler:
        compiling = [(case, compiler.submit(lambda c=case: compile_case(c, jax.devices()[0]))) for case in wanted]
        for case, future in compiling:
            results.case(case.key, lambda c=case, f=future: _compared(c, *f.result(max(1.0, results.left)), host))
    results.done()


def compile_case(case: Case, device: jax.Device) -> tuple[Pipeline, Any]:
    """One stage that is the whole model, and its compiled loss and gradients."""
    config, mesh = case.config(), make_mesh(1, devices=[device])
    schedule = schedules.build(case.schedule, case.method, p=1, m=MICROBATCHES)
    pipe = Pipeline(models.build(config), schedule, mesh, compute_dtype=config.dtype)
    run = pipe.jit(pipe.value_and_grad)
    # The pipeline itself keeps float32 products exact, unless jax is configured otherwise.
    with jax.default_matmul_precision("default") if case.precision == "default" else nullcontext():
        return pipe, run.lower(pipe.layout.shapes(), data(case)[1]).compile()


@cache
def _random(case: Case) -> tuple[Any, dict[str, Any]]:
    random = np.random.default_rng(0)
    shapes = models.build(case.plain()).param_shapes()

    def value(path: tuple, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        around = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return (around + 0.1 * random.standard_normal(shape.shape)).astype(np.float32)

    canonical = jax.tree_util.tree_map_with_path(value, shapes)
    shape = (MICROBATCHES, SEQUENCES, case.seq)
    tokens, labels = (random.integers(0, 1000, shape, dtype=np.int32) for _ in range(2))
    batch = {"tokens": tokens, "labels": labels, "mask": (random.random(shape) >= 0.25).astype(np.float32)}
    if case.documents:
        starts = random.random(shape) < 0.05
        batch["aux_inputs"] = {"segment_ids": np.cumsum(starts, axis=-1, dtype=np.int32)}
    return canonical, batch


def data(case: Case) -> tuple[Any, dict[str, Any]]:
    """Canonical parameters, none of them zero, and a batch of which a quarter does not count; identical for all cases
    with the same model, length and documents."""
    return _random(Case("", model=case.model, documents=case.documents, seq=case.seq, shape=case.shape))


@cache
def _reference(of: Case, dtype: str, host: jax.Device) -> tuple[Any, Any]:
    canonical, batch = data(of)
    model = models.build(of.plain())

    def loss(canonical: Any) -> jax.Array:
        return models.reference_loss(model, canonical, **batch, dtype=dtype)

    with jax.default_device(host):
        return jax.device_get(jax.jit(jax.value_and_grad(loss))(jax.device_put(canonical, host)))


def _compared(case: Case, compiled: tuple[Pipeline, Any], compile_s: float, host: jax.Device) -> dict[str, Any]:
    pipe, run = compiled
    canonical, batch = data(case)
    placed = pipe.shard(canonical)
    loss, grads = jax.device_get(run(placed, batch))
    grads = jax.device_get(pipe.layout.unpack(grads))
    of = Case("", model=case.model, documents=case.documents, seq=case.seq, shape=case.shape)
    want_loss, want = _reference(of, "float32", host)
    errors = {
        jax.tree_util.keystr(path): error
        for path, error in jax.tree_util.tree_leaves_with_path(jax.tree.map(relative_error, grads, want))
    }
    worst = max(errors, key=errors.get)
    tolerance = TOLERANCE
    if case.dtype == "bfloat16":
        rounded = _reference(of, "bfloat16", host)
        tolerance = 2 * max(jax.tree.leaves(jax.tree.map(relative_error, rounded, (want_loss, want))))
    found = {"loss_error": relative_error(loss, want_loss), "grad_error": errors[worst], "worst": worst}
    holds = max(found["loss_error"], found["grad_error"]) <= tolerance
    verdict = {"holds": holds} if case.precision == "highest" else {}
    return dataclasses.asdict(case) | found | {"tolerance": tolerance, "compile_s": compile_s} | verdict


def relative_error(got: Any, want: Any) -> float:
    """‖got - want‖ / ‖want‖; NaN if either is not finite."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))
