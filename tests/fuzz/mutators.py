"""Mutators: blind ones change bytes, structured ones know GGUF and JSON and tell well-formed lies."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from random import Random
from typing import Any

EDGES = (0, 1, 2, 31, 32, 255, 256, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
WORDS = (
    "",
    "a",
    "\x1b[2J",
    "\u202e",
    "../x",
    "/etc/passwd",
    "[red]",
    "llama",
    "Q2_K",
    "nan",
    "x" * 3000,
    "\ud800",
)
FLOATS = (0.0, -0.0, 1e-300, 1e300, -1.0, 0.5)
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9


def blind(content: bytes, rng: Random) -> bytes:
    """Flips, overwrites, cuts, repeats and swaps some bytes."""
    raw = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        if not raw:
            break
        at = rng.randrange(len(raw))
        match rng.randrange(6):
            case 0:
                raw[at] ^= 1 << rng.randrange(8)
            case 1:
                raw[at] = rng.randrange(256)
            case 2:
                raw[at : at + 8] = struct.pack("<Q", rng.choice(EDGES))
            case 3:
                del raw[at:]
            case 4:
                del raw[at : at + rng.randrange(1, 64)]
            case _:
                raw[at:at] = raw[max(0, at - 32) : at]
    return bytes(raw)


def text(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


def record(key: str, rng: Random) -> bytes:
    """A key with a value of any type, which is seldom the one that readers expect."""
    return text(key.encode()) + value(rng)


def value(rng: Random) -> bytes:
    kind = rng.choice((*_WIDTHS, STRING, STRING, ARRAY, ARRAY, 13))
    return struct.pack("<I", kind) + payload(kind, rng)


def payload(kind: int, rng: Random) -> bytes:
    if kind == STRING:
        return text(rng.choice(WORDS).encode("utf-8", "surrogatepass"))
    if kind == ARRAY:
        item = rng.choice((*_WIDTHS, STRING, 13))
        count = rng.choice((0, 1, 2, 5, 300))
        told = count if rng.random() < 0.9 else rng.choice(EDGES)
        return struct.pack("<IQ", item, told) + b"".join(payload(item, rng) for _ in range(count))
    if kind in (6, 12) and rng.random() < 0.7:
        number = rng.choice((*FLOATS[:2], *FLOATS[4:], float("nan"), float("inf")))
        return struct.pack("<f" if kind == 6 else "<d", number)
    return struct.pack("<Q", rng.choice(EDGES))[: _WIDTHS.get(kind, 4)]


Tensor = tuple[str, tuple[int, ...], int, int]
"""Name, shape, type and offset."""


def gguf(records: dict[str, bytes], tensors: Sequence[Tensor], data: int, rng: Random) -> bytes:
    """A file whose parts are well formed, with some records and tensors changed, dropped, repeated or moved."""
    kept = dict(records)
    for key in rng.sample(sorted(kept), min(len(kept), rng.choice((0, 1, 1, 2, 6)))):
        kept[key] = b"" if rng.random() < 0.2 else record(key, rng)
    parts = [part for part in kept.values() if part]
    entries = [tensor_entry(tensor, rng, rng.random() < 0.1) for tensor in tensors]
    for _ in range(rng.choice((0, 0, 1, 2))):
        entries.insert(rng.randrange(len(entries) + 1), rng.choice(entries))
    counts = [len(entries), len(parts)]
    if rng.random() < 0.05:
        counts[rng.randrange(2)] = rng.choice(EDGES)
    head = b"GGUF" + struct.pack("<IQQ", 3, *counts) + b"".join(parts) + b"".join(entries)
    return head + bytes(-len(head) % 32) + bytes(data if rng.random() < 0.9 else rng.randrange(data + 1))


def tensor_entry(tensor: Tensor, rng: Random, changed: bool) -> bytes:
    name, shape, kind, offset = tensor
    if changed:
        match rng.randrange(5):
            case 0:
                shape = tuple(rng.choice((n, rng.choice(EDGES))) for n in shape)
            case 1:
                kind = rng.choice((0, 1, 2, 8, 10, 24, 26, 27, 28, 30, 99))
            case 2:
                offset = rng.choice(EDGES)
            case 3:
                name = rng.choice((*WORDS[:-2], "blk.999999999.attn_q.weight", "blk.0.attn_q.weight", name))
            case _:
                shape = shape[:-1] or (1, 1, 1, 1)
    dims = b"".join(struct.pack("<Q", n) for n in shape)
    return text(name.encode()) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", kind, offset)


def json_text(value: Any, rng: Random) -> bytes:
    """JSON with one to three places changed to something of another type, size or name; sometimes deeply nested."""
    if rng.random() < 0.02:
        return b"[" * 200_000
    changed = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 3))):
        changed = _changed(changed, rng)
    return json.dumps(changed, indent=2).encode()


def _changed(value: Any, rng: Random) -> Any:
    """Goes down at random and changes what it meets in the end."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if rng.random() < 0.05:
            return value | {rng.choice(WORDS): value[key]}
        return value | {key: _changed(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        return [*value[:at], _changed(value[at], rng), *value[at + 1 :]]
    return rng.choice(
        (None, True, [], {}, [[]], rng.choice(WORDS), rng.choice(EDGES), -1, rng.choice(FLOATS), 10**400)
    )
