"""The single-device loss of a model, written as plainly as possible: every pipeline is compared with it.

It shares nothing with the sharded vocabulary layers. Shapes: m microbatches, B sequences in each, L length, D model
width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

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
    """Mean of ``model.loss`` in nats over the valid tokens of the global batch, a float32 scalar; 0 if there are none.

    With a tail, the weighted mean of its depths' losses is added: each depth's loss is a sum over its own valid tokens,
    divided by the number of valid tokens of the main loss.

    ``tokens`` and ``labels`` are ``[m, B, L]``, labels already shifted. ``mask``, of the same shape, is nonzero where a
    label counts (everywhere if None); labels elsewhere may be anything, and a label of -100 never counts.
    ``aux_inputs`` arrays are ``[m, B, ...]``. ``params`` are canonical, used as they are or cast to ``dtype`` first;
    logits and loss are float32 either way.
    """
    sums, counts, scalar = reference_sums(model, params, tokens, labels, mask, aux_inputs, dtype)
    weights = jnp.array([1.0, *[model.tail.weight / model.depths] * model.depths] if model.tail else [1.0])
    return jnp.sum(weights * sums) / jnp.maximum(counts[0], 1) + scalar


def reference_sums(
    model: Model,
    params: Params,
    tokens: jax.Array,
    labels: jax.Array,
    mask: jax.Array | None = None,
    aux_inputs: AuxInputs | None = None,
    dtype: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums of the main loss and of each depth's, and the label counts: two arrays ``[1 + depths]``; and the blocks'
    scalars, averaged over microbatches."""
    if dtype is not None:
        params = jax.tree.map(lambda array: array.astype(dtype), params)
    valid = labels != IGNORED_LABEL
    if mask is not None:
        valid &= mask.astype(bool)
    labels = jnp.where(valid, labels, 0)

    def microbatch(totals: tuple, batch: tuple) -> tuple[tuple, None]:
        tokens_BL, labels_BL, valid_BL, aux_inputs_B = batch
        sums, counts = [], []
        all_logits, scalar = _logits(model, params, tokens_BL, aux_inputs_B)
        for k, logits_BLV in enumerate(all_logits):
            counted_BL = _ahead(valid_BL, k)
            if (ids_BL := aux_inputs_B.get("segment_ids")) is not None:
                counted_BL &= _ahead(ids_BL, k) == ids_BL
            losses_BL = _token_losses(model, logits_BLV, _ahead(labels_BL, k))
            sums.append(jnp.sum(jnp.where(counted_BL, losses_BL, 0.0)))
            counts.append(jnp.sum(counted_BL))
        return (totals[0] + jnp.stack(sums), totals[1] + jnp.stack(counts), totals[2] + scalar), None

    start = jnp.zeros(1 + model.depths, jnp.float32), jnp.zeros(1 + model.depths, jnp.int32), jnp.zeros(())
    sums, counts, scalar = jax.lax.scan(microbatch, start, (tokens, labels, valid, aux_inputs or {}))[0]
    return sums, counts, scalar / len(tokens)


def reference_logits(model: Model, params: Params, tokens_BL: jax.Array, aux_inputs: AuxInputs) -> jax.Array:
    """Float32 logits ``[B, L, V]`` of one microbatch, capped if the loss says so, computed in the dtype of ``params``
    up to the last norm."""
    return _logits(replace(model, tail=None), params, tokens_BL, aux_inputs)[0][0]


def _logits(
    model: Model, params: Params, tokens_BL: jax.Array, aux_inputs: AuxInputs
) -> tuple[list[jax.Array], jax.Array]:
    """The logits of the next token, and of one further token per depth of the tail; the sum of the blocks' scalars."""
    with exact_products(params["embed"]["tokens"].dtype):
        embedded_BLD = params["embed"]["tokens"][tokens_BL] * model.embed_scale
        if model.positions is not None:
            embedded_BLD = embedded_BLD + params["embed"]["positions"][: tokens_BL.shape[1]]
        x_BLD, scalar = embedded_BLD, jnp.zeros((), jnp.float32)
        for n, block_params in enumerate(params["blocks"]):
            own = model.layer_aux_inputs[n] if model.layer_aux_inputs else {}
            x_BLD = model.block(block_params, x_BLD, aux_inputs | own)
            if model.auxiliary:
                x_BLD, more = x_BLD
                scalar += more.astype(jnp.float32)
        streams = [x_BLD]
        for k in range(1, 1 + model.depths):
            ahead_BLD = _ahead(embedded_BLD, k)
            depth_params, own = params["tail"][k - 1], aux_inputs | model.tail_aux_inputs
            streams.append(model.tail.depth(depth_params, streams[-1], ahead_BLD, own))
        finals = [model.final(params["final"], x.reshape(-1, x.shape[-1])).reshape(x.shape) for x in streams]
    head_VD = params["embed"]["tokens"] if model.tied else params["head"]
    return [_capped(model, x_BLD, head_VD) for x_BLD in finals], scalar


def _capped(model: Model, x_BLD: jax.Array, head_VD: jax.Array) -> jax.Array:
    logits_BLV = jnp.matmul(x_BLD.astype(jnp.float32), head_VD.astype(jnp.float32).T, precision="highest")
    cap = model.loss.soft_cap
    return logits_BLV if cap is None else cap * jnp.tanh(logits_BLV / cap)


def _ahead(array: jax.Array, k: int) -> jax.Array:
    """``array [B, L, ...]`` shifted k places to the left, filled with zeros."""
    return jnp.concatenate([array[:, k:], jnp.zeros_like(array[:, :k])], axis=1)


def _token_losses(model: Model, logits_BLV: jax.Array, labels_BL: jax.Array) -> jax.Array:
    """Smoothed cross-entropy and z-loss of every token ``[B, L]``."""
    loss = model.loss
    log_p_BLV = jax.nn.log_softmax(logits_BLV)
    nll_BL = -jnp.take_along_axis(log_p_BLV, labels_BL[..., None], axis=-1)[..., 0]
    smoothed_BL = (1 - loss.label_smoothing) * nll_BL - loss.label_smoothing * jnp.mean(log_p_BLV, axis=-1)
    return smoothed_BL + loss.z_loss * jax.nn.logsumexp(logits_BLV, axis=-1) ** 2
