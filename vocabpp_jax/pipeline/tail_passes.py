"""The tail's part of the last stage's passes, which predicts tokens beyond the next.

Depth k takes the stream of depth k - 1 and the input layer's output k positions ahead. Both are passed from depth to
depth as one array ``[2, B, L, D]``, with the second shifted by one position each time. All depths are then the same
function, and the gradient of the embeddings comes back at the positions of the tokens.

The rings are those of the layers, prefixed with ``tail_``, and four more: ``ahead`` and ``behind`` for the embeddings
and their gradients, ``streams`` and ``returned`` ``[cells, depths, B, L, D]`` for the inputs of the output layer and
their gradients. If the vocabulary is unsharded, the pass itself looks up the embeddings.

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
"""The ring that a pass has a cell of if and only if the tail takes part in it."""


def shifting(depth: Callable) -> Callable:
    """One depth as a shape-preserving function ``(params, x [2, B, L, D], aux_inputs) -> [2, B, L, D]``."""

    def shifted(params: Any, x_2BLD: jax.Array, aux_inputs: Any) -> jax.Array:
        embedded_BLD = jnp.pad(x_2BLD[1, :, 1:], ((0, 0), (0, 1), (0, 0)))
        return jnp.stack([depth(params, x_2BLD[0], embedded_BLD, aux_inputs), embedded_BLD])

    return shifted


@dataclass(frozen=True)
class Tail:
    """One device's tail, for one batch.

    Attributes:
        passes: the passes of one depth in the form of :func:`shifting`.
        steps: the vocabulary layers' instructions.
        params: one tree per depth.
        aux_inputs: per-microbatch inputs of the blocks, ``[m, B, ...]``.
        own: the per-layer aux inputs of the tail's layers.
    """

    passes: Linearized
    steps: VocabularySteps
    params: tuple[Any, ...]
    aux_inputs: Any
    own: Any

    def initial_state(self, rings: dict[str, int], x: jax.ShapeDtypeStruct) -> State:
        """The tail's rings and zero gradients; ``x`` is the shape of the stream between blocks."""
        depths = len(self.params)
        streams = jax.ShapeDtypeStruct((depths, *x.shape), x.dtype)
        shapes = {"ahead": x, "behind": x, "streams": streams, "returned": streams}
        state = {ring: zeros(rings[ring], shape) for ring, shape in shapes.items() if ring in rings}
        stored = (self.passes.residual, self.passes.kept, self.passes.carried)
        state |= {r: (zeros(rings[r], s),) * depths for r, s in zip(RINGS, stored, strict=True) if r in rings}
        if "returned" in rings:
            state["grads.tail"] = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), self.params)
        return state

    def forward(self, state: State, cells: Cells) -> State:
        """F: from the last layer's output ``out``, which is left unchanged, to the streams for the output layer."""
        i, aux_inputs = cells["microbatch"], self._aux_inputs(cells)
        embedded_BLD = get(state["ahead"], cells["ahead"]) if "ahead" in cells else self.steps.ahead(i)
        x_2BLD, streams = jnp.stack([state["out"], embedded_BLD]), []
        for k, params in enumerate(self.params):
            x_2BLD, residual, kept = self.passes.forward(params, aux_inputs, x_2BLD)
            streams.append(x_2BLD[0])
            for ring, values in (("tail_residual", residual), ("tail_kept", kept)):
                if ring in cells:
                    state = state | {ring: replaced(state[ring], k, put(state[ring][k], cells[ring], values))}
        return state | {"streams": put(state["streams"], cells["streams"], jnp.stack(streams))}

    def backward(self, state: State, cells: Cells) -> State:
        """B: from the gradients of the streams; adds the gradient of the last layer's output to ``out``."""
        aux_inputs, returned = self._aux_inputs(cells), get(state["returned"], cells["returned"])
        g_2BLD = jnp.stack([returned[-1], jnp.zeros_like(returned[-1])])
        for k in reversed(range(len(self.params))):
            above = (g_2BLD, state["grads.tail"][k + 1] if k + 1 < len(self.params) else ())
            residual = get(state["tail_residual"][k], delay_until(cells["tail_residual"], above))
            kept = get(state["tail_kept"][k], delay_until(cells["tail_kept"], above)) if "tail_kept" in cells else ()
            dparams, g_2BLD, carried = self.passes.backward(self.params[k], aux_inputs, residual, kept, g_2BLD)
            if k:
                g_2BLD = g_2BLD.at[0].add(returned[k - 1])
            state = self._accumulate(state, k, dparams)
            if "tail_carried" in cells:
                ring = put(state["tail_carried"][k], cells["tail_carried"], carried)
                state = state | {"tail_carried": replaced(state["tail_carried"], k, ring)}
        # Added in place: a slice alone would be copied into the buffer that the loop carries.
        state = state | {"out": state["out"] + g_2BLD[0]}
        if "behind" in cells:
            return state | {"behind": put(state["behind"], cells["behind"], g_2BLD[1])}
        return self.steps.ahead_gradient(state, cells["microbatch"], g_2BLD[1])

    def weights(self, state: State, cells: Cells) -> State:
        """W: the weight gradients, from the values kept by F and carried over by B."""
        for k, params in enumerate(self.params):
            # Reads wait as those of the layers do, see Executor.weights.
            below = state["grads.tail"][k - 1] if k else None
            cell = {r: delay_until(cells[r], below) if k else wait_for_passes(state, cells[r]) for r in RINGS[1:]}
            kept, carried = (get(state[ring][k], cell[ring]) for ring in RINGS[1:])
            state = self._accumulate(state, k, self.passes.weights(params, self._aux_inputs(cells), kept, carried))
        return state

    @property
    def changes(self) -> dict[str, tuple[str, ...]]:
        """The state entries that each kind of pass updates besides rings."""
        embedded = () if self.steps.layout.sharded else self.steps.ahead_gradients
        return {"F": (), "B": ("out", "grads.tail", *embedded), "W": ("grads.tail",)}

    def _aux_inputs(self, cells: Cells) -> Any:
        return get(self.aux_inputs, cells["microbatch"]) | self.own

    def _accumulate(self, state: State, k: int, gradients: Any) -> State:
        total = accumulated(state["grads.tail"][k], gradients)
        return state | {"grads.tail": replaced(state["grads.tail"], k, total)}
