"""Scaling of the input gradient for its sum over shards: one power-of-two unit per token.

A sum over K shards is rounded K - 1 times, each time to the dtype used on the wire. In bfloat16 that alone would cost
more accuracy than all other rounding in the output layer combined. float16 has the same size and three more mantissa
bits, but a narrow exponent range, so values are first divided by a unit that every shard knows and that centres them in
that range. Units are powers of two, so the division is exact.

Shapes, per device: N tokens, D model width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

F32 = jnp.float32
# A bound is 2^8 to 2^9 units. float16 goes up to 2^16, which leaves room for sums of many times the bound; it keeps 11
# bits down to 2^-14, so an element may be a millionth of the bound, as for a token with p(label) = 0.999999.
_UNITS = 2.0**-8


def summed_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype in which sums over shards are communicated; as many bytes as the compute dtype ``dtype``."""
    return jnp.dtype(jnp.float16 if dtype == jnp.bfloat16 else dtype)


def unit(bound_N: jax.Array) -> jax.Array:
    """The power of two ``[N]`` to divide each token by, given a bound on its summands; float32 in and out."""
    power_N = lax.bitcast_convert_type(lax.bitcast_convert_type(bound_N * _UNITS, jnp.int32) & 0x7F800000, F32)
    return jnp.where(power_N > 0, power_N, 1)


def in_units(x_ND: jax.Array, unit_N: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """``x_ND`` divided by its units, in :func:`summed_dtype` of the compute dtype ``dtype``."""
    return (x_ND / unit_N[:, None]).astype(summed_dtype(dtype))


def from_units(x_ND: jax.Array, unit_N: jax.Array) -> jax.Array:
    """Inverse of :func:`in_units`, in float32."""
    return x_ND.astype(F32) * unit_N[:, None]
