"""Which transfers share a permute, and where it leaves and lands.

A transfer leaves behind its pass, or anywhere before the next pass of its source or target, and lands where its first
reader needs it. A permute takes two buffers on every device while it is under way, and it is launched in every
interval. So transfers that leave together and land near each other share one. :class:`..schedule.Order` says when
transfers leave, and how near they must land.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Transfer(NamedTuple):
    """A transfer between a pair of devices, in all intervals of a scan.

    Attributes:
        source, target: the devices.
        until: the line of the body before which it must leave.
        due: the line before which it must have landed.
        line: the line behind which it may leave.
    """

    source: int
    target: int
    until: int
    due: int
    line: int


class Permute(NamedTuple):
    """Transfers that share a permute, which leaves before the line ``at`` and lands before the line ``due``."""

    at: int
    due: int
    transfers: tuple[Transfer, ...]


def permutes(transfers: Iterable[Transfer], apart: int | None) -> list[Permute]:
    """As few permutes as hold the transfers, with no device the source, or the target, of two pairs.

    A permute leaves where one of its transfers can wait no longer.

    Args:
        transfers: in the order of the lines behind which they may leave.
        apart: how many lines apart transfers that share a permute may be due; None for any.
    """
    waiting, made = list(transfers), []
    while waiting:
        first = min(waiting, key=lambda transfer: transfer.until)
        group, due = [first], first.due
        for transfer in waiting:
            if transfer.line >= first.until:
                break
            free = all(transfer.source != x.source and transfer.target != x.target for x in group)
            if free and (apart is None or abs(due - transfer.due) <= apart):
                group, due = [*group, transfer], min(due, transfer.due)
        waiting = [transfer for transfer in waiting if transfer not in group]
        made.append(Permute(first.until, due, tuple(group)))
    return made
