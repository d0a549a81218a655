"""Full float32 precision for float32 matrix products, on GPUs too.

By default, float32 matrix products on GPUs use TF32, with a 10-bit mantissa. A pipeline and its reference would then
differ by 1e-3, and a float32 run would not really be float32.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import jax
import jax.numpy as jnp


def exact_products(dtype: str | jnp.dtype) -> AbstractContextManager:
    """A context for tracing products with compute dtype ``dtype``, which gives float32 ones full float32 precision.

    Does nothing for bfloat16, where a higher precision would only select slower kernels, or if
    ``jax_default_matmul_precision`` is set: ``jax.default_matmul_precision("tensorfloat32")`` still gives TF32.
    """
    if jnp.dtype(dtype) != jnp.float32 or jax.config.jax_default_matmul_precision is not None:
        return nullcontext()
    return jax.default_matmul_precision("highest")
