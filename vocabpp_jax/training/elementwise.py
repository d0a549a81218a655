"""Rejects optimizers that need whole parameters: in a pipeline, no device holds one as they would expect."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jax
import optax
from jax.extend.core import jaxprs_in_params

_MIXES = re.compile(
    r"(reduce_(?!and$|or$|precision$)|arg(max|min)|cum|sort|top_k|dot_general|conv_general|fft|cholesky|eig|svd|qr|lu$"
    r"|triangular)"
)
"""Primitives whose result depends on several entries of an operand. Testing for finite entries is allowed."""


def refuse_mixing(optimizer: optax.GradientTransformation, params: Any) -> None:
    """Trace an update on shapes alone and check it.

    Raises:
        ValueError: some operation mixes the entries of an array as large as a parameter, as layerwise norms, factored
            moments and matrix products do.
    """
    state = jax.eval_shape(optimizer.init, params)
    update = jax.make_jaxpr(optimizer.update)(params, state, params)
    sizes = {x.size for x in jax.tree.leaves(params)} - {1}
    for equation in _equations(update.jaxpr):
        name = equation.primitive.name
        if _MIXES.match(name) and any(x.aval.size in sizes for x in equation.invars if hasattr(x.aval, "size")):
            raise ValueError(
                f"optimizer mixes the entries of a parameter (by {name}); in a pipeline one array holds a layer of "
                "every stage, and each device a part of it, so give an elementwise optimizer, and to "
                "limit the global norm use make_step's clip"
            )


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _equations(inner)
