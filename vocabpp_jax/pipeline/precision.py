"""Products of float32 in float32, on GPUs too.

GPUs multiply float32 matrices in TF32, with 10 bits of mantissa, unless the program says otherwise. A pipeline and its
reference would then differ by 1e-3, and a run in float32 would not be one.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import jax
import jax.numpy as jnp


def exact_products(dtype: str | jnp.dtype) -> AbstractContextManager:
    """A context in which products are traced that compute in ``dtype``: those of float32 are exact to float32.

    bfloat16 is left as it is, where a precision could only choose slower kernels, and so is everything where
    ``jax_default_matmul_precision`` is set: ``jax.default_matmul_precision("tensorfloat32")`` gets TF32.
    """
    if jnp.dtype(dtype) != jnp.float32 or jax.config.jax_default_matmul_precision is not None:
        return nullcontext()
    return jax.default_matmul_precision("highest")
