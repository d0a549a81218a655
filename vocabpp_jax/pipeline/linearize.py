"""Splits a block into separate forward and backward passes with explicit residuals.

``jax.vjp`` returns a pytree whose leaves are the residuals. :func:`linearize` traces it once and classifies them.
Residuals that depend on the block's input are stored by F and passed to B. Those that depend only on parameters or aux
inputs (weights, masks, rotary tables) are never stored, but read or recomputed in B. The backward can be split further
into the input gradient (B) and the weight gradient (W), with the values that W needs from B also made explicit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, DropVar, Jaxpr, Literal, Var
from jax.interpreters.partial_eval import dce_jaxpr

Tree = Any
Arrays = tuple[jax.Array, ...]

# Recomputed in W from their operand instead of being carried over from B.
_VIEWS = {"reshape", "squeeze", "transpose", "expand_dims", "broadcast_in_dim", "copy", "rev"}


@dataclass(frozen=True)
class Linearized:
    """The passes of one block. ``residual``, ``kept`` and ``carried`` are the shapes of the values stored between them.

    Attributes:
        forward: ``(params, aux_inputs, x) -> y, residual, kept``, where y is the block's return value.
        backward: ``(params, aux_inputs, residual, kept, g) -> dparams, dx, carried``. If unsplit, ``dparams`` is
            complete and ``carried`` empty; if split, matrices are None in ``dparams`` and come from ``weights``.
        weights: ``(params, aux_inputs, kept, carried) -> dparams``, in which vectors are None; None if unsplit.
        residual: values from ``forward`` that only ``backward`` needs.
        kept: values from ``forward`` that ``weights`` needs, and possibly ``backward`` too.
        carried: values from ``backward`` that ``weights`` needs.
    """

    forward: Callable[[Tree, Tree, jax.Array], tuple[Tree, Arrays, Arrays]]
    backward: Callable[[Tree, Tree, Arrays, Arrays, jax.Array], tuple[Tree, jax.Array, Arrays]]
    weights: Callable[[Tree, Tree, Arrays, Arrays], Tree] | None
    residual: tuple[jax.ShapeDtypeStruct, ...]
    kept: tuple[jax.ShapeDtypeStruct, ...]
    carried: tuple[jax.ShapeDtypeStruct, ...]


def linearize(block: Callable, params: Tree, x: jax.ShapeDtypeStruct, aux_inputs: Tree, *, split: bool) -> Linearized:
    """The passes of ``block(params, x, aux_inputs)`` at the given shapes.

    Args:
        block: a pure function that preserves the shape and dtype of ``x``. It may also return a float32 scalar, whose
            gradient is 1.
        params, x, aux_inputs: :class:`jax.ShapeDtypeStruct` trees of per-device shapes.
        split: whether weight gradients are a separate pass. Gradients of vectors (norms, biases) stay in ``backward``:
            in ``weights`` they would repeat a matrix product.

    Raises:
        ValueError: the block changes the shape or dtype of its input, or returns anything else besides the scalar.
    """
    params_flat, params_tree = jax.tree.flatten(params)
    aux_flat = jax.tree.leaves(aux_inputs)
    fwd, vjp_tree, y_tree = _trace_forward(block, params, aux_inputs, x)
    returned, residuals = fwd.jaxpr.outvars[: y_tree.num_leaves], fwd.jaxpr.outvars[y_tree.num_leaves :]
    stored = _stored_residuals(fwd.jaxpr, residuals, len(params_flat) + len(aux_flat))
    run_forward = _subset(fwd, [*returned, *stored])
    leaves = dict.fromkeys(v for v in residuals if isinstance(v, Var))
    rederived = [v for v in leaves if v not in set(stored)]
    rederive = _subset(fwd, rederived)

    def whole_backward(params_flat, aux_flat, stored_values, g):
        known = dict(zip(stored, stored_values, strict=True))
        # No rederived value depends on x, so any array of its shape will do here; the trace drops it as unused.
        known |= dict(zip(rederived, rederive(*params_flat, *aux_flat, g), strict=True))
        vjp = jax.tree.unflatten(vjp_tree, [_value(v, known) for v in residuals])
        dparams, dx = vjp(y_tree.unflatten([g, *[jnp.ones((), jnp.float32)] * (len(returned) - 1)]))
        return (*jax.tree.leaves(dparams), dx)

    stored_shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in stored]
    bwd = _inlined(jax.make_jaxpr(whole_backward)(params_flat, aux_flat, stored_shapes, x))
    late = [split and len(s.shape) >= 2 for s in params_flat]
    parts = _split(bwd, late, len(params_flat) + len(aux_flat), len(stored))
    in_kept = [n in parts.kept for n in range(len(stored))]

    def forward(params, aux_inputs, x):
        out = run_forward(*jax.tree.leaves(params), *jax.tree.leaves(aux_inputs), x)
        y, values = y_tree.unflatten(out[: len(returned)]), out[len(returned) :]
        return (
            y,
            tuple(v for v, k in zip(values, in_kept, strict=True) if not k),
            tuple(v for v, k in zip(values, in_kept, strict=True) if k),
        )

    def backward(params, aux_inputs, residual, kept, g):
        residual, kept = iter(residual), iter(kept)
        values = [next(kept) if k else next(residual) for k in in_kept]
        out = parts.early(*jax.tree.leaves(params), *jax.tree.leaves(aux_inputs), *values, g)
        early = iter(out)
        dparams = params_tree.unflatten([None if w else next(early) for w in late])
        return dparams, next(early), tuple(early)

    def weights(params, aux_inputs, kept, carried):
        grads = iter(parts.late(*jax.tree.leaves(params), *jax.tree.leaves(aux_inputs), *kept, *carried))
        return params_tree.unflatten([next(grads) if w else None for w in late])

    select = lambda wanted: tuple(s for s, k in zip(stored_shapes, in_kept, strict=True) if k == wanted)  # noqa: E731
    return Linearized(forward, backward, weights if split else None, select(False), select(True), parts.carried)


def _trace_forward(
    block: Callable, params: Tree, aux_inputs: Tree, x: jax.ShapeDtypeStruct
) -> tuple[ClosedJaxpr, Any, Any]:
    """The jaxpr of ``(params, aux_inputs, x) -> *y, *residuals``, and the treedefs of the VJP, whose leaves are the
    residuals, and of y."""
    trees = []

    def forward(params, aux_inputs, x):
        y, vjp = jax.vjp(lambda params, x: block(params, x, aux_inputs), params, x)
        leaves, tree = jax.tree.flatten(vjp)
        trees.append(tree)
        return y, leaves

    jaxpr, (y, _) = jax.make_jaxpr(forward, return_shape=True)(params, aux_inputs, x)
    stream, *scalars = jax.tree.leaves(y)
    if (stream.shape, stream.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"block turns {x.dtype}{list(x.shape)} into {stream.dtype}{list(stream.shape)}; "
            "a pipelined block must preserve shape and dtype"
        )
    if len(scalars) > 1 or any((s.shape, s.dtype) != ((), jnp.float32) for s in scalars):
        found = ", ".join(f"{s.dtype}{list(s.shape)}" for s in scalars)
        raise ValueError(f"block returns {found} besides the stream; it may return one float32 scalar for the loss")
    return _inlined(jaxpr), trees[-1], jax.tree.structure(y)


def _value(v: Var | Literal, known: dict[Var, Any]) -> Any:
    return v.val if isinstance(v, Literal) else known[v]


def _stored_residuals(jaxpr: Jaxpr, residuals: Sequence, constants: int) -> list[Var]:
    """The residuals that depend on the block's input, without duplicates."""
    dependent = set(jaxpr.invars[constants:])
    for eqn in jaxpr.eqns:
        if any(isinstance(v, Var) and v in dependent for v in eqn.invars):
            dependent |= set(eqn.outvars)
    leaves = [v for v in residuals if isinstance(v, Var)]
    return [v for v in dict.fromkeys(leaves) if v in dependent]


def _subset(closed: ClosedJaxpr, outputs: Sequence) -> Callable:
    """A function of the jaxpr's inputs that computes only the given variables."""
    jaxpr = closed.jaxpr.replace(outvars=list(outputs), debug_info=closed.jaxpr.debug_info.with_unknown_names())
    jaxpr, _ = dce_jaxpr(jaxpr, [True] * len(outputs), instantiate=True)
    return partial(jax.core.eval_jaxpr, jaxpr, closed.consts)


def _inlined(closed: ClosedJaxpr) -> ClosedJaxpr:
    """The same program with nested jits inlined, so that it can be cut anywhere."""

    def evaluate(jaxpr: Jaxpr, consts: Iterable, *args):
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
        for eqn in jaxpr.eqns:
            values = [_value(v, env) for v in eqn.invars]
            if eqn.primitive.name in ("jit", "pjit", "closed_call"):
                inner = eqn.params.get("jaxpr") or eqn.params["call_jaxpr"]
                out = evaluate(inner.jaxpr, inner.consts, *values)
            else:
                out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
                out = out if eqn.primitive.multiple_results else [out]
            env.update(zip(eqn.outvars, out, strict=True))
        return [_value(v, env) for v in jaxpr.outvars]

    return jax.make_jaxpr(partial(evaluate, closed.jaxpr, closed.consts))(*closed.in_avals)


@dataclass(frozen=True)
class _Parts:
    early: Callable  # (constants, stored, g) -> early gradients, dx, carried
    late: Callable  # (constants, kept, carried) -> late gradients
    kept: frozenset[int]
    carried: tuple[jax.ShapeDtypeStruct, ...]


def _split(bwd: ClosedJaxpr, late: Sequence[bool], constants: int, stored: int) -> _Parts:
    """Splits a backward in two: the early part computes dx and the gradients not in ``late``, the late part the rest.

    An equation that contributes to both, such as a checkpointed region, is in both parts, and dead code elimination
    keeps only what each part needs. Values of the early part that the late part uses are carried over.
    """
    jaxpr = bwd.jaxpr
    outputs = jaxpr.outvars
    early_out = [v for v, w in zip(outputs[:-1], late, strict=True) if not w] + [outputs[-1]]
    late_out = [v for v, w in zip(outputs[:-1], late, strict=True) if w]
    if not late_out:
        return _Parts(_subset(bwd, early_out), lambda *_: (), frozenset(), ())
    early, _ = dce_jaxpr(
        jaxpr.replace(outvars=early_out, debug_info=jaxpr.debug_info.with_unknown_names()),
        [True] * len(early_out),
        instantiate=True,
    )
    rest, _ = dce_jaxpr(
        jaxpr.replace(outvars=late_out, debug_info=jaxpr.debug_info.with_unknown_names()),
        [True] * len(late_out),
        instantiate=True,
    )
    fixed = set(jaxpr.invars[:constants]) | set(jaxpr.constvars)
    from_forward = {v: n for n, v in enumerate(jaxpr.invars[constants : constants + stored])}
    made_early = {v for eqn in early.eqns for v in eqn.outvars if eqn.primitive.name not in _VIEWS}
    made_early |= {jaxpr.invars[-1]}
    kept, carried, eqns = set(), [], []
    needed = {v for v in late_out if isinstance(v, Var)}
    for eqn in reversed(rest.eqns):
        made = [v for v in eqn.outvars if v in needed]
        if not made or all(v in made_early for v in made):
            continue
        # Values carried over from the early part are not recomputed: drop those outputs here.
        eqns.append(eqn.replace(outvars=[DropVar(v.aval) if v in made_early else v for v in eqn.outvars]))
        needed |= {v for v in eqn.invars if isinstance(v, Var)}
    for v in jaxpr.invars[constants:] + [v for eqn in early.eqns for v in eqn.outvars]:
        if v in needed and v not in fixed:
            if v in from_forward:
                kept.add(from_forward[v])
            elif v in made_early:
                carried.append(v)
    late_in = [*jaxpr.invars[:constants], *(jaxpr.invars[constants + n] for n in sorted(kept)), *carried]
    late_jaxpr = jaxpr.replace(
        invars=late_in, outvars=late_out, eqns=eqns[::-1], debug_info=jaxpr.debug_info.with_unknown_names()
    )
    late_jaxpr, _ = dce_jaxpr(late_jaxpr, [True] * len(late_out), instantiate=True)
    return _Parts(
        _subset(bwd, [*early_out, *carried]),
        partial(jax.core.eval_jaxpr, late_jaxpr, bwd.consts),
        frozenset(kept),
        tuple(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in carried),
    )
