"""The loss of a model on one device, written as plainly as possible: what every pipeline is held against.

It shares nothing with the sharded vocabulary layers. Shapes: m microbatches, B sequences in each, L length,
D model width, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vocabpp_jax.pipeline.model_interface import AuxInputs, Model, Params
from vocabpp_jax.pipeline.precision import exact_products
from vocabpp_jax.vocab import IGNORED_LABEL


def reference_loss(
    model: Model,
    params: Params,
    tokens: jax.Array,
    labels: jax.Array,
    mask: jax.Array | None = None,
    aux_inputs: AuxInputs | None = None,
    dtype: str | None = None,
) -> jax.Array:
    """Mean of ``model.loss`` in nats over the valid tokens of the global batch, a float32 scalar; 0 where none is.

    ``tokens`` and ``labels`` are ``[m, B, L]``, labels already shifted; ``mask`` of the same shape is true (nonzero)
    where a label counts, everywhere if None, and its labels may be anything elsewhere; a label of -100 never counts.
    ``aux_inputs`` arrays are
    ``[m, B, ...]``. ``params`` are canonical and computed with as they are, or cast to ``dtype`` first; logits and
    loss are float32 either way.
    """
    if dtype is not None:
        params = jax.tree.map(lambda array: array.astype(dtype), params)
    valid = labels != IGNORED_LABEL
    if mask is not None:
        valid &= mask.astype(bool)
    labels = jnp.where(valid, labels, 0)

    def microbatch(total: jax.Array, batch: tuple) -> tuple[jax.Array, None]:
        tokens_BL, labels_BL, valid_BL, side_B = batch
        logits_BLV = reference_logits(model, params, tokens_BL, side_B)
        return total + jnp.sum(jnp.where(valid_BL, _token_losses(model, logits_BLV, labels_BL), 0.0)), None

    total, _ = jax.lax.scan(microbatch, jnp.zeros((), jnp.float32), (tokens, labels, valid, aux_inputs or {}))
    return total / jnp.maximum(jnp.sum(valid), 1)


def reference_logits(model: Model, params: Params, tokens_BL: jax.Array, aux_inputs: AuxInputs) -> jax.Array:
    """Float32 logits ``[B, L, V]`` of one microbatch, capped where the loss says so, computed in the dtype of
    ``params`` up to the last norm."""
    with exact_products(params["embed"]["tokens"].dtype):
        x_BLD = params["embed"]["tokens"][tokens_BL] * model.embed_scale
        if model.positions is not None:
            x_BLD = x_BLD + params["embed"]["positions"][: tokens_BL.shape[1]]
        for n, block_params in enumerate(params["blocks"]):
            x_BLD = model.block(
                block_params, x_BLD, aux_inputs | (model.layer_aux_inputs[n] if model.layer_aux_inputs else {})
            )
        x_BLD = model.final(params["final"], x_BLD.reshape(-1, x_BLD.shape[-1])).reshape(x_BLD.shape)
    head_VD = params["embed"]["tokens"] if model.tied else params["head"]
    logits_BLV = jnp.matmul(x_BLD.astype(jnp.float32), head_VD.astype(jnp.float32).T, precision="highest")
    cap = model.loss.soft_cap
    return logits_BLV if cap is None else cap * jnp.tanh(logits_BLV / cap)


def _token_losses(model: Model, logits_BLV: jax.Array, labels_BL: jax.Array) -> jax.Array:
    """Smoothed cross entropy and z-loss of every token ``[B, L]``."""
    loss = model.loss
    log_p_BLV = jax.nn.log_softmax(logits_BLV)
    nll_BL = -jnp.take_along_axis(log_p_BLV, labels_BL[..., None], axis=-1)[..., 0]
    smoothed_BL = (1 - loss.label_smoothing) * nll_BL - loss.label_smoothing * jnp.mean(log_p_BLV, axis=-1)
    return smoothed_BL + loss.z_loss * jax.nn.logsumexp(logits_BLV, axis=-1) ** 2
