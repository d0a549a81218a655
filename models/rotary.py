"""Rotary positions (arXiv 2104.09864) in Llama's layout: the two halves of a head are the two coordinates.

Shapes, per device: B batch, L length, H heads, K head width.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from vocabpp_jax.models.config import RotaryConfig


def frequencies(config: RotaryConfig) -> np.ndarray:
    """Radians per token ``[K / 2]`` in float32.

    With scaling, as in Llama 3.1, long wavelengths are stretched by its factor, short ones kept, and those between
    blended.
    """
    radians = 1.0 / config.rope_theta ** (np.arange(0, config.head_size, 2, dtype=np.float32) / config.head_size)
    scaling = config.rope_scaling
    if scaling is None:
        return radians.astype(np.float32)
    # How often a wavelength fits into the original training length decides which.
    turns = scaling.original_seq * radians / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (kept * radians + (1 - kept) * radians / scaling.factor).astype(np.float32)


def rotated(x_BLHK: jax.Array, frequencies: np.ndarray) -> jax.Array:
    """Every head's halves, rotated by the token's position times the frequencies; computed in float32."""
    angles = jnp.arange(x_BLHK.shape[1], dtype=jnp.float32)[:, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BLHK.dtype)
