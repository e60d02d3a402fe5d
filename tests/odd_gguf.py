"""Metadata records of every type that GGUF knows, packed by gguf-py: Cerebellum reads them and writes few."""

from __future__ import annotations

from typing import Any

import gguf
from gguf import GGUFValueType


def any_kv(key: str, value: Any, value_type: GGUFValueType, item_type: GGUFValueType | None = None) -> bytes:
    """Returns one key-value record with gguf-py's bytes; ``item_type`` is what an ARRAY holds."""
    writer = gguf.GGUFWriter(None, "")
    name = writer._pack_val(key, GGUFValueType.STRING, add_vtype=False)
    if value_type == GGUFValueType.ARRAY and item_type is not None and len(value) == 0:
        head = (writer._pack("I", value_type), writer._pack("I", item_type), writer._pack("Q", 0))
        return bytes(name + b"".join(head))  # gguf-py refuses an empty array, which files may hold
    return bytes(name + writer._pack_val(value, value_type, add_vtype=True, sub_type=item_type))
