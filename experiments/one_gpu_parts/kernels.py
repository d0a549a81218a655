"""Rates that the GPU reaches: copies, matrix products, attention. The cost model's efficiencies come from these."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from vocabpp_jax.pipeline.mesh import GPU_PLATFORMS

from .gpu_sizes import Size
from .results import Results
from .timing import Compiler, middle, noise, steps

PRODUCTS = ((2048, 3072, 12_288), (2048, 5120, 20_480), (2048, 3072, 4000), (8192, 8192, 8192))
"""Tokens, width, and the inner width: products go there and back."""
ATTENTION = ((24, 128, 2048), (24, 128, 4096), (40, 128, 2048))
"""Heads, head width, and length."""


def measure(size: Size, results: Results) -> None:
    """Compile every kernel, then time them all."""
    tiny, device = size.name == "tiny", jax.devices()[0]
    runs: dict[str, tuple[Callable, tuple, float]] = {"copy": _copy(2**12 if tiny else 2**28)}
    for shape in ((8, 8, 16),) if tiny else PRODUCTS:
        runs["product {} x {} x {}".format(*shape)] = _product(*shape)
    for shape in ((2, 8, 16),) if tiny else ATTENTION:
        for backward in (False, True):
            name = "attention, {} heads of {}, s={}".format(*shape) + (", with its backward" if backward else "")
            runs[name] = attention(*shape, backward, device)
    runs = {name: run for name, run in runs.items() if not results.has(name)}
    with Compiler() as compiler:
        compiling = {
            name: compiler.submit(lambda f=f, s=shapes: compile_kernel(f, s, device))
            for name, (f, shapes, _) in runs.items()
        }
        programs = {name: results.attempt(f"compile {name}", partial(f.result, 60)) for name, f in compiling.items()}
    for name, (_, shapes, amount) in runs.items():
        if programs[name]:
            results.case(name, lambda p=programs[name][0], s=shapes, a=amount: _timed(p, s, a, size.repeats))


def compile_kernel(run: Callable, shapes: tuple, device: jax.Device) -> Any:
    """``(*arrays, count) -> array``, compiled for a device."""
    there = SingleDeviceSharding(device)
    given = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=there) for s in (*shapes, jnp.zeros((), jnp.int32))]
    return jax.jit(run).lower(*given).compile()


def _timed(program: Any, shapes: tuple, amount: float, repeats: int, count: int = 20) -> dict[str, float]:
    """Microseconds of one loop iteration, and FLOPs or bytes per second."""
    arguments = jax.jit(lambda: noise(shapes, 1.0))()
    few, many = jnp.int32(0), jnp.int32(count)
    base = middle(steps(lambda: program(*arguments, few), 2 * repeats))
    took = (middle(steps(lambda: program(*arguments, many), 2 * repeats)) - base) / count
    return {"us": 1e6 * took, "per_second": amount / took}


def _array(*shape: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _copy(size: int) -> tuple[Callable, tuple, float]:
    def run(x: jax.Array, count: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, count, lambda i, x: x * 1.0001 + 1, x)

    return run, (_array(size, dtype="float32"),), 8.0 * size


def _product(n: int, d: int, wide: int) -> tuple[Callable, tuple, float]:
    def run(x: jax.Array, up: jax.Array, down: jax.Array, count: jax.Array) -> jax.Array:
        scale = jnp.bfloat16((d * wide) ** -0.5)
        return jax.lax.fori_loop(0, count, lambda i, x: ((x @ up) @ down) * scale, x)

    return run, (_array(n, d), _array(d, wide), _array(wide, d)), 4.0 * n * d * wide


def attention(heads: int, width: int, length: int, backward: bool, device: jax.Device) -> tuple[Callable, tuple, float]:
    """Causal attention, cuDNN's on a GPU: the function that repeats it, its input shapes, its FLOPs."""
    cudnn = device.platform in GPU_PLATFORMS

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn" if cudnn else "xla")

    def once(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        if not backward:
            return attend(q, k, v)
        y, vjp = jax.vjp(attend, q, k, v)
        return sum(vjp(y))

    def run(q: jax.Array, k: jax.Array, v: jax.Array, count: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, count, lambda i, q: once(q, k, v), q)

    shape = _array(1, length, heads, width)
    flops = 2.0 * length * length * heads * width  # of the causal half, two products
    return run, (shape, shape, shape), flops * (3.5 if backward else 1)
