"""Transfers between neighbouring stages: a permute of the latest pass's output, and its landing in the inbox.

Shapes, per device: B microbatch, L length, D width; the inbox and the outbox have a leading axis of cells.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

from ..schedules import Instruction
from .buffers import Cells, State, get, passes_wait_for, put_if, wait_for_passes
from .mesh import PIPE
from .nccl import TRANSFER_STREAM


def fill_outbox(state: State, cells: Cells) -> State:
    """Copies a pass's output to the outbox if its transfer is deferred."""
    return state | {"outbox": put_if(state["outbox"], cells["outbox"], state["out"])} if "outbox" in cells else state


def start_transfer(state: State, instruction: Instruction, cells: Cells) -> tuple[State, jax.Array]:
    """Issues a transfer of the latest pass's output, or of an outbox cell filled in the previous interval.

    The send buffer is not written by later passes.
    """
    with jax.named_scope("transfer"):
        x_BLD = get(state["outbox"], jnp.maximum(cells["outbox"], 0)) if "outbox" in cells else state["out"]
        sent_BLD = wait_for_passes(state, x_BLD)
        with set_xla_metadata(**TRANSFER_STREAM):
            received_BLD = lax.ppermute(sent_BLD, PIPE, instruction.pairs)
    return passes_wait_for(state, sent_BLD), received_BLD


def land_transfer(state: State, received_BLD: jax.Array, cells: Cells) -> State:
    """Puts a received array into the inbox, after all earlier passes, so that none of them waits for the transfer."""
    received_BLD = wait_for_passes(state, received_BLD)
    return state | {"inbox": put_if(state["inbox"], cells["deliver"], received_BLD)}
