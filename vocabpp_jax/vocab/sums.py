"""How an input gradient is summed over shards: in units of a power of two for each token.

A sum over K shards is rounded K - 1 times, each time to the dtype that is communicated. In bfloat16 that alone would
cost more than all other rounding of the output layer together. float16 has as many bytes and three more bits, but
little range: so what is summed is divided by a unit that every shard knows, which centres it in that range. Units are
powers of two, and a division by one is exact.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

F32 = jnp.float32
# A bound is 2^8 to 2^9 units. float16 goes to 2^16, so sums of many times the bound fit; it is exact to 11 bits down to
# 2^-14, so an element may be a millionth of the bound, as for a token with p(label) = 0.999999.
_UNITS = 2.0**-8


def summed_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """What sums over shards are communicated in, of as many bytes as the compute dtype."""
    return jnp.dtype(jnp.float16 if dtype == jnp.bfloat16 else dtype)


def unit(bound: jax.Array) -> jax.Array:
    """For each token the power of two to divide by, from a bound ``[N]`` on what is summed, in float32 too."""
    power = lax.bitcast_convert_type(lax.bitcast_convert_type(bound * _UNITS, jnp.int32) & 0x7F800000, F32)
    return jnp.where(power > 0, power, 1)


def in_units(x: jax.Array, unit: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """``x [N, D]`` as :func:`summed_dtype` holds it; ``dtype`` is the compute dtype."""
    return (x / unit[:, None]).astype(summed_dtype(dtype))


def from_units(x: jax.Array, unit: jax.Array) -> jax.Array:
    """The opposite, in float32."""
    return x.astype(F32) * unit[:, None]
