"""Sizes as people write them: 14.2GB, 13GiB, or plain bytes."""

from __future__ import annotations

import re

_UNITS = {
    **{"": 1, "b": 1},
    **{"kb": 10**3, "mb": 10**6, "gb": 10**9},
    **{"kib": 2**10, "mib": 2**20, "gib": 2**30},
}


def parse_size(text: str) -> int:
    """Bytes; ValueError for anything that is not a number with one of the units above."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not found or found[2].lower() not in _UNITS:
        raise ValueError(f"{text!r} is not a size such as 14.2GB or 13GiB")
    return round(float(found[1]) * _UNITS[found[2].lower()])
