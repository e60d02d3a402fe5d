"""How much memory a model needs to run, from its metadata: weights, cache, state and compute.

The formulas are llama.cpp's own at its defaults (one sequence, F16 cache, F32 state, flash attention,
batches of 512 tokens): `llama_kv_cache` (src/llama-kv-cache.cpp), `llama_memory_recurrent` with
`n_embd_r` and `n_embd_s` (src/llama-hparams.cpp). The compute buffer is an estimate: the logits and
the attention mask of one batch, which is what it holds at its largest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cerebellum.gguf import GgufFile

CARDS_GIB = (8, 12, 16, 24)
"""Memory of the graphics cards people have, GiB."""

RESERVE_BYTES = 512 << 20
"""What the driver and a display take of a card before any model is loaded; a round guess."""

_CACHE_BYTES, _STATE_BYTES, _LOGIT_BYTES, _MASK_BYTES = 2, 4, 4, 2
_BATCH_TOKENS = 512  # llama.cpp's n_ubatch
_MAX_TEXT, _MAX_ITEMS = 2000, 1024
_TEMPLATE_KEY = "tokenizer.chat_template"

Metadata = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes at one context length, in tokens. ``compute`` is an estimate, the others are exact."""

    context: int
    weights: int
    cache: int
    state: int
    compute: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.state + self.compute

    def fits(self, card_gib: int) -> bool:
        """Whether all of it goes on a card of that size, with what the driver takes set aside."""
        return self.total + RESERVE_BYTES <= card_gib << 30


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What memory depends on, read off the metadata once."""

    weights: int
    cache_bytes_per_token: int
    state: int
    vocabulary: int
    attends: bool

    def at(self, context: int) -> Memory:
        """The memory at ``context`` tokens of one conversation."""
        mask = _MASK_BYTES * context if self.attends else 0
        return Memory(
            context=context,
            weights=self.weights,
            cache=self.cache_bytes_per_token * context,
            state=self.state,
            compute=_BATCH_TOKENS * (_LOGIT_BYTES * self.vocabulary + mask),
        )


def plain_metadata(file: GgufFile) -> dict[str, Any]:
    """The header's short facts, fit for JSON: general.* and the architecture's own keys.

    Of a chat template only its presence is kept: it is a program, and nothing here runs it.
    """
    architecture = file.value("general.architecture", "")
    prefixes = ("general.", f"{architecture}.", "tokenizer.ggml.model", "tokenizer.ggml.pre")
    found = {key: _plain(file.value(key)) for key in file.kv_records if key.startswith(prefixes)}
    facts = {key: value for key, value in found.items() if value is not None}
    tokens = file.value("tokenizer.ggml.tokens", [])
    return facts | {"vocabulary": len(tokens), "chat_template": _TEMPLATE_KEY in file.kv_records}


def _plain(value: Any) -> Any:
    """A value for JSON, or None where it is too long or not finite."""
    if isinstance(value, str):
        return value[:_MAX_TEXT]
    if isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    items = list(value) if len(value) <= _MAX_ITEMS else []
    plain = [_plain(item.item() if hasattr(item, "item") else item) for item in items]
    return plain if plain and None not in plain else None


def memory_shape(
    metadata: Metadata, attention_layers: Sequence[int], n_recurrent: int, weights: int
) -> Shape:
    """Reads the shape off ``plain_metadata``. A sliding window is ignored, so its cache is too high."""
    cache = sum(_cache_elements(metadata, layer) for layer in attention_layers)
    return Shape(
        weights=weights,
        cache_bytes_per_token=_CACHE_BYTES * cache,
        state=_STATE_BYTES * n_recurrent * _state_elements(metadata),
        vocabulary=_number(metadata, "vocab_size") or int(metadata.get("vocabulary", 0)),
        attends=bool(attention_layers),
    )


def contexts(full: int) -> tuple[int, ...]:
    """The context lengths worth a row: 4K, 32K and all the model has."""
    return tuple(sorted({n for n in (4096, 32768) if n < full} | {full})) if full else (4096,)


def has_sliding_window(metadata: Metadata) -> bool:
    return _number(metadata, "attention.sliding_window") > 0


def _cache_elements(metadata: Metadata, layer: int) -> int:
    """Keys and values of one token in one layer; latent attention keeps its values inside its keys."""
    heads = _number(metadata, "attention.head_count", layer)
    width = _number(metadata, "embedding_length") // max(heads, 1)
    keys = _number(metadata, "attention.key_length") or width
    values = _number(metadata, "attention.value_length") or width
    if _number(metadata, "attention.key_length_mla"):
        values = 0
    return (_number(metadata, "attention.head_count_kv", layer) or heads) * (keys + values)


def _state_elements(metadata: Metadata) -> int:
    """What one recurrent layer remembers: convolution and state (Mamba), shifts (RWKV), or a window."""
    inner, state = _number(metadata, "ssm.inner_size"), _number(metadata, "ssm.state_size")
    if inner:
        groups, kernel = _number(metadata, "ssm.group_count"), _number(metadata, "ssm.conv_kernel")
        return (kernel - 1) * (inner + 2 * groups * state) + state * inner
    width = _number(metadata, "embedding_length")
    if head := _number(metadata, "wkv.head_size"):
        return width * (head + (_number(metadata, "token_shift_count") or 2))
    return width * max(_number(metadata, "shortconv.l_cache") - 1, 0)


def _number(metadata: Metadata, suffix: str, layer: int = 0) -> int:
    """An architecture's count, of a list the layer's own; 0 where it is not given."""
    value = metadata.get(f"{metadata.get('general.architecture', '')}.{suffix}", 0)
    if isinstance(value, list):
        value = value[layer] if layer < len(value) else 0
    return int(value) if isinstance(value, int | float) else 0
