"""Sizes, counts and changes as people write and read them: 14.2GB, 13 GiB, +1.90% [+1.70, +2.10]."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal

_UNITS = {
    **{"": 1, "b": 1},
    **{"kb": 10**3, "mb": 10**6, "gb": 10**9},
    **{"kib": 2**10, "mib": 2**20, "gib": 2**30},
}

_MOST_DIGITS = 40
_NO_DISK = 1 << 62


def parse_size(text: str) -> int:
    """Returns bytes; ValueError for what is no number with one of the units above, or more than any disk has."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not found or found[2].lower() not in _UNITS:
        raise ValueError(f"{text!r} is not a size such as 14.2GB or 13GiB")
    n_bytes = round(Decimal(found[1][:_MOST_DIGITS]) * _UNITS[found[2].lower()])
    if len(found[1]) > _MOST_DIGITS or n_bytes >= _NO_DISK:
        raise ValueError(f"{text[:24]!r} is more bytes than any disk or GPU has; give a size such as 13GiB")
    return n_bytes


def count(number: float) -> str:
    """31.4 M, 32.2 B: parameters as people say them."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f} {unit}"
    return f"{number:.0f}"


def size(n_bytes: float) -> str:
    """Decimal units, as file managers and the Hub show them."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(n_bytes) >= limit:
            return f"{n_bytes / limit:.4g} {unit}"
    return f"{n_bytes:.0f} B"


def gib(n_bytes: float) -> str:
    """Binary units where llama.cpp's own figures are binary: 14.198 GiB, 7.24 MiB."""
    if n_bytes >= 1 << 30:
        return f"{n_bytes / (1 << 30):.3f} GiB"
    if 0 < n_bytes < (1 << 20) // 200:  # 0.00 MiB would say nothing
        return f"{n_bytes:,.0f} bytes"
    return f"{n_bytes / (1 << 20):.2f} MiB"


def percent(value: float | None, interval: Sequence[float | None] | None = None) -> str:
    """+1.90% [+1.70, +2.10]; a dash where there is nothing."""
    if value is None:
        return "-"
    text = f"{value:+.2f}%"
    if interval and None not in interval and interval[0] != interval[1]:
        text += f" [{interval[0]:+.2f}, {interval[1]:+.2f}]"
    return text


def nats(value: float, interval: Sequence[float | None]) -> str:
    """0.007249 nats [0.006956, 0.007542]."""
    if None in interval:
        return f"{value:.6f} nats"
    return f"{value:.6f} nats [{interval[0]:.6f}, {interval[1]:.6f}]"


def number(value: float | None, digits: int = 4) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"
