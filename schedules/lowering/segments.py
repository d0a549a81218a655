"""Where the warm-up, the steady state and the cool-down begin and end.

A scan runs all instructions of its body in all its intervals, also where they have nothing to do: idle passes cost
little, idle transfers and collectives more; and every further scan has to be compiled. Where one interval needs all
that any interval needs, one scan is enough, unless the ends are to be apart. Otherwise up to three share the intervals
so that the whole costs least, a steady state counted as if it always had the same length: once there is one, more
microbatches do not change the program.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import numpy as np

IDLE_TRANSFER = 4  # what an idle transfer of all devices costs, in idle passes
# Intervals in which an idle instruction costs as much as compiling it once more, by Order.ends_apart.
COMPILED = (16, 16, 8)
SCAN = 256  # what one more scan costs, in idle passes
APART = 16  # the same if the ends are to be apart
STEADY = 64  # what a run of more than p like intervals counts as


def scan_bounds(
    p: int, interval: np.ndarray, identity: np.ndarray, pair: np.ndarray, ends_apart: int = 0, windows: int = 0
) -> list[tuple[int, int]]:
    """First interval and end of every scan, from each event's interval, instruction and pair of devices (or -1).

    The first ``windows`` intervals are one.

    Raises:
        ValueError: not so many intervals.
    """
    if windows:
        rest = interval >= windows
        if windows < 0 or not rest.any():
            raise ValueError(f"windows is {windows} and intervals are {int(interval.max()) + 1}; give fewer, from 0 on")
        scans = scan_bounds(p, interval[rest] - windows, identity[rest], pair[rest], ends_apart)
        return [(0, windows), *((a + windows, b + windows) for a, b in scans)]
    needs, cost = _needs(p, interval, identity, pair)
    runs = [(need, len(list(same))) for need, same in groupby(needs)]
    everything = 0
    for need, _ in runs:
        everything |= need
    starts = np.cumsum([0] + [length for _, length in runs]).tolist()
    if not ends_apart and any(need == everything for need, _ in runs):
        return [(0, starts[-1])]
    lengths = [STEADY if length > p else length for _, length in runs]
    scan = p * (APART if ends_apart else SCAN)
    needs = [need for need, _ in runs]
    return [(starts[a], starts[b]) for a, b in _cheapest(needs, lengths, cost, scan, COMPILED[ends_apart])]


def _needs(
    p: int, interval: np.ndarray, identity: np.ndarray, pair: np.ndarray
) -> tuple[list[int], Callable[[int], int]]:
    """For every interval a set, as bits, of the instructions and pairs it needs; and the cost of such a set."""
    lines, line = np.unique(identity, return_inverse=True)
    sent = np.flatnonzero(pair >= 0)
    pairs, which = np.unique(pair[sent], return_inverse=True)
    found = np.zeros((int(interval.max()) + 1, len(lines) + len(pairs)), bool)
    found[interval, line] = True
    found[interval[sent], len(lines) + which] = True
    transfers = sum(1 << n for n in range(len(lines), len(lines) + len(pairs)))

    def cost(need: int) -> int:
        return p * (need & ~transfers).bit_count() + IDLE_TRANSFER * (need & transfers).bit_count()

    return [int.from_bytes(np.packbits(row, bitorder="little").tobytes(), "little") for row in found], cost


def _cheapest(
    needs: list[int], lengths: list[int], cost: Callable[[int], int], scan: int, compiled: int
) -> list[tuple[int, int]]:
    """The division of the runs ``0 .. n-1`` into at most three parts that costs least."""
    n, starts = len(needs), np.cumsum([0, *lengths]).tolist()

    def costs_from(a: int) -> list[int]:
        """The cost of a part from run ``a`` to before run ``b``, for every ``b`` after it."""
        union, found = 0, [0] * (n + 1)
        for b in range(a + 1, n + 1):
            union |= needs[b - 1]
            found[b] = (starts[b] - starts[a] + compiled) * cost(union) + scan
        return found

    part = [costs_from(a) for a in range(n)]
    best = (part[0][n], ())
    for a in range(1, n):
        best = min(best, (part[0][a] + part[a][n], (a,)))
        for b in range(a + 1, n):
            if (total := part[0][a] + part[a][b] + part[b][n]) < best[0]:
                best = (total, (a, b))
    bounds = (0, *best[1], n)
    return list(zip(bounds[:-1], bounds[1:], strict=True))
