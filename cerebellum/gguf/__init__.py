"""Reads and writes GGUF files: a tool that knows the format and the sizes of types, and nothing of the
stages.
"""

from gguf import GGMLQuantizationType, GGUFValueType

from cerebellum.gguf.presets import parse_preset, preset_label, preset_names
from cerebellum.gguf.reader import GgufFile, TensorInfo, decode_record, read_gguf, record_key
from cerebellum.gguf.types import (
    LADDER,
    SEARCHED,
    bits_per_weight,
    block_size,
    fits,
    is_quantized,
    legal_types,
    needs_imatrix,
    parse_type,
    parse_weight_type,
    row_bytes,
    tensor_bytes,
)
from cerebellum.gguf.writer import (
    TensorMeta,
    TensorSource,
    encode_header,
    encode_kv,
    gguf_size,
    write_gguf,
)

__all__ = [
    "LADDER",
    "SEARCHED",
    "GGMLQuantizationType",
    "GGUFValueType",
    "GgufFile",
    "TensorInfo",
    "TensorMeta",
    "TensorSource",
    "bits_per_weight",
    "block_size",
    "decode_record",
    "encode_header",
    "encode_kv",
    "fits",
    "gguf_size",
    "is_quantized",
    "legal_types",
    "needs_imatrix",
    "parse_preset",
    "parse_type",
    "parse_weight_type",
    "preset_label",
    "preset_names",
    "read_gguf",
    "record_key",
    "row_bytes",
    "tensor_bytes",
    "write_gguf",
]
