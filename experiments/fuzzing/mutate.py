"""Random input that is almost valid: bytes and JSON with a few changes, and unexpected option values."""

from __future__ import annotations

import json
from random import Random
from typing import Any

STRINGS = (
    "",
    " ",
    "x",
    "text",
    "-1",
    "None",
    "null",
    "☃",
    "\ufeff",
    "\n",
    "../..",
    "/",
    "a" * 5000,
    "{}",
    "<s>",
    "\ud800",
)
NUMBERS = (-1, 0, 1, 2, 3, 7, 8, 255, 256, 65536, 2**31, 2**63, 10**30, -(10**9), 0.0, -0.5, 1.5, 1e-30, 1e308)
ODD = (float("nan"), float("inf"), -float("inf"))


def bytes_of(random: Random, like: bytes) -> bytes:
    """Random bytes, or those of ``like`` after a few changes."""
    if random.random() < 0.2:
        return random.randbytes(random.choice((0, 1, 7, 64, 1000)))
    raw = bytearray(like)
    for _ in range(random.choice((1, 1, 2, 5))):
        at, size = random.randrange(len(raw) + 1), random.choice((1, 2, 8, 100))
        match random.randrange(5):
            case 0:
                raw[at : at + size] = random.randbytes(len(raw[at : at + size]))
            case 1:
                del raw[at : at + size]
            case 2:
                raw[at:at] = random.randbytes(size)
            case 3:
                del raw[at:]
            case 4 if raw:
                raw[min(at, len(raw) - 1)] ^= 1 << random.randrange(8)
    return bytes(raw)


def value_of(random: Random, depth: int = 0) -> Any:
    """Any JSON value."""
    kind = random.randrange(9 if depth < 3 else 6)
    match kind:
        case 0:
            return None
        case 1:
            return random.random() < 0.5
        case 2 | 3:
            return random.choice(NUMBERS)
        case 4:
            return random.choice(STRINGS)
        case 5:
            return random.choice(ODD)
        case 6:
            return [value_of(random, depth + 1) for _ in range(random.randrange(4))]
    return {random.choice(STRINGS): value_of(random, depth + 1) for _ in range(random.randrange(3))}


def json_of(random: Random, like: Any) -> Any:
    """``like`` with a few values replaced, removed or added at any depth."""
    if random.random() < 0.03:
        return value_of(random)
    root = [json.loads(json.dumps(like))]
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        at: Any = root
        while True:
            keys = list(range(len(at))) if isinstance(at, list) else list(at)
            if not keys:
                break
            key = random.choice(keys)
            if isinstance(at[key], (list, dict)) and at[key] and (at is root or random.random() < 0.7):
                at = at[key]
                continue
            match random.randrange(6):
                case 0 if at is not root:
                    del at[key]
                case 1 if isinstance(at, dict):
                    at[random.choice(STRINGS)] = value_of(random)
                case _:
                    at[key] = value_of(random)
            break
    return root[0]


def text_of_json(random: Random, like: Any) -> bytes:
    """JSON of the right shape with a few changes, or such JSON as bytes with a few more."""
    raw = json.dumps(json_of(random, like)).encode()
    return bytes_of(random, raw) if random.random() < 0.15 else raw


def word_of(random: Random, *good: str) -> str:
    """A value for an option: often a good one, else anything that a shell can pass."""
    if good and random.random() < 0.6:
        return random.choice(good)
    odd = [s.replace("\ud800", "\udcff") for s in STRINGS] + [str(n) for n in NUMBERS] + ["nan", "inf", "1e3", "0x10"]
    return random.choice(odd)
