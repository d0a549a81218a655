"""The tail's part of the last stage's passes: what predicts further tokens than the next.

Depth k takes the stream of the depth before it and the input layer's output k places ahead. Both go from depth to depth
as one array ``[2, B, L, D]``, the second shifted by one place each time, so that all depths are one function, and its
gradient comes back in the places of the tokens.

The rings are those of the layers with ``tail_`` before their names, and four more: ``ahead`` and ``behind`` for the
embeddings and their gradients, ``streams`` and ``returned`` ``[cells, depths, B, L, D]`` for what goes to the output
layer and what comes back. Where the vocabulary is not sharded, embeddings are looked up in the pass itself.

Shapes, per device: B microbatch, L length, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ..vocab.instructions import VocabularySteps
from .buffers import Cells, State, accumulated, delay_until, get, put, replaced, wait_for_passes, zeros
from .linearize import Linearized

RINGS = ("tail_residual", "tail_kept", "tail_carried")
CELL = {"F": "streams", "B": "returned", "W": "tail_carried"}
"""The ring of which a pass has a cell where the tail has part in it."""


def shifting(depth: Callable) -> Callable:
    """One depth as a function that keeps shape: ``(params, both [2, B, L, D], aux_inputs) -> both [2, B, L, D]``."""

    def shifted(params: Any, both: jax.Array, aux_inputs: Any) -> jax.Array:
        embedded = jnp.pad(both[1, :, 1:], ((0, 0), (0, 1), (0, 0)))
        return jnp.stack([depth(params, both[0], embedded, aux_inputs), embedded])

    return shifted


@dataclass(frozen=True)
class Tail:
    """One device's tail, for one batch.

    Attributes:
        passes: those of one depth as :func:`shifting` makes it.
        steps: what the vocabulary layers' instructions do.
        params: a tree for each depth.
        aux_inputs: per-microbatch inputs of the blocks, ``[m, B, ...]``.
        own: what a layer of the tail finds among them as its own.
    """

    passes: Linearized
    steps: VocabularySteps
    params: tuple[Any, ...]
    aux_inputs: Any
    own: Any

    def initial_state(self, rings: dict[str, int], x: jax.ShapeDtypeStruct) -> State:
        """The tail's rings and zero gradients; ``x`` is the stream between blocks."""
        depths = len(self.params)
        each = jax.ShapeDtypeStruct((depths, *x.shape), x.dtype)
        shapes = {"ahead": x, "behind": x, "streams": each, "returned": each}
        state = {ring: zeros(rings[ring], shape) for ring, shape in shapes.items() if ring in rings}
        stored = (self.passes.residual, self.passes.kept, self.passes.carried)
        state |= {r: (zeros(rings[r], s),) * depths for r, s in zip(RINGS, stored, strict=True) if r in rings}
        if "returned" in rings:
            state["grads.tail"] = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), self.params)
        return state

    def forward(self, state: State, cells: Cells) -> State:
        """From the last layer's output ``out``, which stays, to the streams for the output layer."""
        i, aux_inputs = cells["microbatch"], self._aux_inputs(cells)
        embedded = get(state["ahead"], cells["ahead"]) if "ahead" in cells else self.steps.ahead(i)
        both, streams = jnp.stack([state["out"], embedded]), []
        for k, params in enumerate(self.params):
            both, residual, kept = self.passes.forward(params, aux_inputs, both)
            streams.append(both[0])
            for ring, values in (("tail_residual", residual), ("tail_kept", kept)):
                if ring in cells:
                    state = state | {ring: replaced(state[ring], k, put(state[ring][k], cells[ring], values))}
        return state | {"streams": put(state["streams"], cells["streams"], jnp.stack(streams))}

    def backward(self, state: State, cells: Cells) -> State:
        """From the gradients of the streams; adds that of the last layer's output to ``out``."""
        aux_inputs, returned = self._aux_inputs(cells), get(state["returned"], cells["returned"])
        g = jnp.stack([returned[-1], jnp.zeros_like(returned[-1])])
        for k in reversed(range(len(self.params))):
            made = (g, state["grads.tail"][k + 1] if k + 1 < len(self.params) else ())
            residual = get(state["tail_residual"][k], delay_until(cells["tail_residual"], made))
            kept = get(state["tail_kept"][k], delay_until(cells["tail_kept"], made)) if "tail_kept" in cells else ()
            dparams, g, carried = self.passes.backward(self.params[k], aux_inputs, residual, kept, g)
            g = g.at[0].add(returned[k - 1] if k else state["out"])
            state = self._added(state, k, dparams)
            if "tail_carried" in cells:
                ring = put(state["tail_carried"][k], cells["tail_carried"], carried)
                state = state | {"tail_carried": replaced(state["tail_carried"], k, ring)}
        state = state | {"out": g[0]}
        if "behind" in cells:
            return state | {"behind": put(state["behind"], cells["behind"], g[1])}
        return self.steps.ahead_gradient(state, cells["microbatch"], g[1])

    def weights(self, state: State, cells: Cells) -> State:
        """The weight gradients, from what F kept and B carried over."""
        for k, params in enumerate(self.params):
            # Waiting as the layers' do.
            before = state["grads.tail"][k - 1] if k else None
            at = {r: delay_until(cells[r], before) if k else wait_for_passes(state, cells[r]) for r in RINGS[1:]}
            kept, carried = (get(state[ring][k], at[ring]) for ring in RINGS[1:])
            state = self._added(state, k, self.passes.weights(params, self._aux_inputs(cells), kept, carried))
        return state

    @property
    def changes(self) -> dict[str, tuple[str, ...]]:
        """What each pass changes beside rings, by its kind."""
        embedded = () if self.steps.layout.sharded else self.steps.ahead_gradients
        return {"F": (), "B": ("out", "grads.tail", *embedded), "W": ("grads.tail",)}

    def _aux_inputs(self, cells: Cells) -> Any:
        return get(self.aux_inputs, cells["microbatch"]) | self.own

    def _added(self, state: State, k: int, gradients: Any) -> State:
        total = accumulated(state["grads.tail"][k], gradients)
        return state | {"grads.tail": replaced(state["grads.tail"], k, total)}
