"""How much memory a model needs to run, from its metadata: weights, cache, state and compute.

The formulas are llama.cpp's own at its defaults (F16 cache, F32 state, flash attention, batches of 512
tokens, all layers on the card): `llama_kv_cache` and `llama_kv_cache_iswa` (src/llama-kv-cache*.cpp),
`llama_memory_recurrent` with `n_embd_r` and `n_embd_s` (src/llama-hparams.cpp). Two parts are bounds from
above: the cache of a model whose windows are not known here, and the compute buffer, which depends on
what can take whose place in a graph. ``ask`` has llama.cpp's own figures instead.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cerebellum.errors import AnswerIsNo
from cerebellum.gguf import GgufFile
from cerebellum.llama.allocation import memory_report
from cerebellum.units import gib

CARDS_GIB = (8, 12, 16, 24)
"""Memory of the graphics cards people have, GiB."""

RESERVE_BYTES = 512 << 20
"""What the driver and a display take of a card before any model is loaded; a round guess."""

SERVER_SEQUENCES = 4
"""llama-server's slots without `-np`. They share one cache; each has a recurrent state of its own."""

CELLS = 256
"""llama.cpp pads a cache to so many tokens, so contexts between are not worth asking for."""

_CACHE_BYTES, _STATE_BYTES, _VALUE_BYTES, _MASK_BYTES = 2, 4, 4, 2
_BATCH_TOKENS = 512  # llama.cpp's n_ubatch
_GIB = 1 << 30
_LOG_BYTES = (1 << 20) // 64  # two buffers, in hundredths of a MiB
_MAX_TEXT, _MAX_ITEMS = 2000, 1024
_TEMPLATE_KEY = "tokenizer.chat_template"
_WINDOW, _PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
_WINDOW_PERIODS = {"gemma2": 2, "gemma3": 6, "gpt-oss": 2, "cohere2": 4, "olmo2": 4}
"""Without a pattern in the file, one of so many layers sees everything (`load_swa_pattern`)."""
_OTHER_WINDOWS = ("llama4", "smallthinker")  # llama.cpp knows their windows better than their files do
_NO_WINDOWS = ("phi3", "phimoe")  # it ignores these
_INPUTS = ("token_embd.weight", "per_layer_token_embd.weight", "position_embd.weight", "token_types.weight")

Metadata = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on the card for ``context`` tokens, shared by ``sequences`` conversations.

    ``asked`` says that cache, state and compute are llama.cpp's own figures for this machine's card.
    """

    context: int
    weights: int
    cache: int
    state: int
    compute: int
    sequences: int = 1
    asked: bool = False

    @property
    def beside_weights(self) -> int:
        return self.cache + self.state + self.compute

    @property
    def total(self) -> int:
        return self.weights + self.beside_weights

    def fits(self, card_gib: int) -> bool:
        """Whether all of it goes on a card of that size, with what the driver takes set aside."""
        return self.total + RESERVE_BYTES <= card_gib * _GIB


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What memory depends on, read off the metadata once.

    ``cache_bytes_per_token`` is of the layers that see everything, ``window_bytes_per_token`` of those
    that see ``window`` tokens; ``state`` of one conversation. ``activations`` is how many values one
    token has at the widest layer.
    """

    weights: int
    cache_bytes_per_token: int
    window_bytes_per_token: int
    window: int
    state: int
    vocabulary: int
    activations: int
    attention_layers: int
    window_layers: int
    recurrent_layers: int

    def at(self, context: int, sequences: int = 1) -> Memory:
        """The memory at ``context`` tokens, shared by ``sequences`` conversations."""
        cells, tokens = _padded(context), min(context, _BATCH_TOKENS)
        seen = _padded(min(cells, self.window * sequences + tokens)) if self.window else 0
        return Memory(
            context=context,
            sequences=sequences,
            weights=self.weights,
            cache=self.cache_bytes_per_token * cells + self.window_bytes_per_token * seen,
            state=self.state * sequences,
            compute=self._compute(tokens, cells + seen, sequences),
        )

    def _compute(self, tokens: int, cells: int, sequences: int) -> int:
        """A batch's logits, masks and widest layer, as if none of them could take another's place."""
        mask = _MASK_BYTES * cells if self.attention_layers else 0
        values = _VALUE_BYTES * (self.vocabulary + self.activations)
        layer_state = self.state * sequences // max(self.recurrent_layers, 1)
        return tokens * (values + mask) + 2 * layer_state  # the state before and after


def ask(shape: Shape, paths: Sequence[Path], context: int, sequences: int = 1) -> Memory:
    """``shape.at`` with what llama.cpp says it allocates for these files; the weights stay the shape's.

    It reads their header only. Where it has no card, the compute buffer it tells of is the CPU's. A
    card's may be larger (less can be reused), so that the bound stands where it is the larger one.
    """
    memory, said = shape.at(context, sequences), memory_report(paths, context, sequences=sequences)
    return replace(
        memory,
        cache=_exact(memory.cache, said.cache),
        state=_exact(memory.state, said.state),
        compute=said.compute if said.on_card else max(said.compute, memory.compute),
        asked=said.on_card,
    )


def _exact(n_bytes: int, said: int) -> int:
    """The formula's bytes where llama.cpp says the same but for the rounding of its log."""
    return n_bytes if abs(n_bytes - said) <= _LOG_BYTES else said


def weights_budget(
    shape: Shape, memory: Memory, card_bytes: int, *, at_least: int = 1, reserve_bytes: int = RESERVE_BYTES
) -> int:
    """Bytes of tensors that go on a card beside the rest of ``memory``.

    A file may be larger: by its header, and by the tensors that are ``off_the_card``. Raises AnswerIsNo
    where fewer than ``at_least`` bytes are left, with the context or the card that would do.
    """
    left = card_bytes - reserve_bytes - memory.beside_weights
    if left >= at_least:
        return left
    room = card_bytes - reserve_bytes - at_least
    longest = largest_context(shape, room, memory.context - 1, memory.sequences)
    instead = f"a context of {longest:,} tokens or " if longest else ""
    raise AnswerIsNo(
        f"{gib(card_bytes)} is too little at {memory.context:,} tokens: cache {gib(memory.cache)}, state "
        f"{gib(memory.state)}, compute {gib(memory.compute)} and {gib(reserve_bytes)} set aside leave "
        f"{gib(max(left, 0))} for weights that take at least {gib(at_least)}; {instead}"
        f"a card of {-((left - at_least - card_bytes) // _GIB)} GiB would do"
    )


def largest_context(shape: Shape, room_bytes: int, below: int, sequences: int = 1) -> int:
    """The most tokens, a multiple of CELLS up to ``below``, for which all but the weights fits; or 0."""
    fits, too_many = 0, below // CELLS + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if shape.at(middle * CELLS, sequences).beside_weights <= room_bytes:
            fits = middle
        else:
            too_many = middle
    return fits * CELLS


def off_the_card(tensor_names: Collection[str]) -> frozenset[str]:
    """Tensors that llama.cpp keeps in main memory although all layers are on the card: input embeddings.

    One that is the output too (tied) goes on the card, and a second time into main memory.
    """
    tied = "output.weight" not in tensor_names
    return frozenset(_INPUTS[1:] if tied else _INPUTS) & frozenset(tensor_names)


def memory_json(
    shape: Shape, memory: Memory, card_bytes: int, reserve_bytes: int = RESERVE_BYTES
) -> dict[str, Any]:
    """Everything on the card, in bytes; ``free`` is negative where it does not fit."""
    return {
        "context": memory.context,
        "sequences": memory.sequences,
        "weights": memory.weights,
        "cache": memory.cache,
        "cache_bytes_per_token": shape.cache_bytes_per_token,
        "attention_layers": shape.attention_layers,
        "window": shape.window,
        "window_bytes_per_token": shape.window_bytes_per_token,
        "window_layers": shape.window_layers,
        "state": memory.state,
        "recurrent_layers": shape.recurrent_layers,
        "server_sequences": SERVER_SEQUENCES,
        "compute": memory.compute,
        "compute_from": "llama.cpp" if memory.asked else "bound",
        "reserve": reserve_bytes,
        "total": memory.total + reserve_bytes,
        "card": card_bytes,
        "free": card_bytes - memory.total - reserve_bytes,
    }


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
    """Reads the shape off ``plain_metadata``; ``weights`` are the bytes of the tensors on the card."""
    windowed = [layer for layer in attention_layers if _sees_window(metadata, layer)]
    whole = [layer for layer in attention_layers if layer not in windowed]
    return Shape(
        weights=weights,
        cache_bytes_per_token=_CACHE_BYTES * sum(_cache_elements(metadata, layer) for layer in whole),
        window_bytes_per_token=_CACHE_BYTES * sum(_cache_elements(metadata, layer) for layer in windowed),
        window=_number(metadata, _WINDOW) if windowed else 0,
        state=_STATE_BYTES * n_recurrent * _state_elements(metadata),
        vocabulary=_number(metadata, "vocab_size") or int(metadata.get("vocabulary", 0)),
        activations=max(_activations(metadata), default=0),
        attention_layers=len(attention_layers),
        window_layers=len(windowed),
        recurrent_layers=n_recurrent,
    )


def contexts(full: int) -> tuple[int, ...]:
    """The context lengths worth a row: 4K, 32K and all the model has."""
    return tuple(sorted({n for n in (4096, 32768) if n < full} | {full})) if full else (4096,)


def ignores_window(metadata: Metadata) -> bool:
    """Whether some layers see a window that is not known well enough: their cache is then too high."""
    known = metadata.get("general.architecture") in _NO_WINDOWS or _window_pattern(metadata)
    return _number(metadata, _WINDOW) > 0 and not known


def _window_pattern(metadata: Metadata) -> list[bool] | int:
    """Which layers see a window, or how many layers come to one that sees everything; 0: not known."""
    architecture = metadata.get("general.architecture", "")
    pattern = metadata.get(f"{architecture}.{_PATTERN}")
    if architecture in (*_NO_WINDOWS, *_OTHER_WINDOWS) or not _number(metadata, _WINDOW):
        return 0
    if isinstance(pattern, list):
        return pattern
    period = _WINDOW_PERIODS.get(architecture, 0)
    return pattern if period and isinstance(pattern, int) else period


def _sees_window(metadata: Metadata, layer: int) -> bool:
    pattern = _window_pattern(metadata)
    if isinstance(pattern, list):
        return layer < len(pattern) and bool(pattern[layer])
    return pattern > 0 and layer % pattern < pattern - 1


def _padded(tokens: int) -> int:
    return -(-tokens // CELLS) * CELLS


def _activations(metadata: Metadata) -> Iterator[int]:
    """Values of one token in each kind of layer, with six of the residual stream's width and one of the
    queries' in each: what is there at once, and the gaps that leaves.

    Read off the graphs of src/llama-graph.cpp and src/models: queries, keys, values and their result;
    gate, up and product of a feed-forward layer, and of each expert used, with its result or that and
    its weighted copy; the projections, convolution, scan and gate of a recurrent layer.
    """
    width = _number(metadata, "embedding_length")
    heads, keys, values = _heads(metadata, _widest_layer(metadata))
    queries = _largest(metadata, "attention.head_count") * max(keys, values)
    common = 6 * width + queries
    yield common + 3 * queries + 2 * heads * (keys + values)
    yield common + 3 * _largest(metadata, "feed_forward_length")
    yield common + _expert_activations(metadata, width)
    yield common + _recurrent_activations(metadata, width)


def _expert_activations(metadata: Metadata, width: int) -> int:
    used = _number(metadata, "expert_used_count")
    inner = _largest(metadata, "expert_feed_forward_length") or _largest(metadata, "feed_forward_length")
    shared = 3 * _largest(metadata, "expert_shared_feed_forward_length")
    return used * (width + max(3 * inner, width)) + shared + 3 * _number(metadata, "expert_count")


def _recurrent_activations(metadata: Metadata, width: int) -> int:
    inner, state = _number(metadata, "ssm.inner_size"), _number(metadata, "ssm.state_size")
    if not inner:
        return 12 * width if _state_elements(metadata) else 0
    mixed = inner + 2 * _number(metadata, "ssm.group_count") * state
    return 5 * inner + 3 * mixed + _number(metadata, "ssm.time_step_rank")


def _widest_layer(metadata: Metadata) -> int:
    """The layer with the most heads for keys and values: a hybrid's others have none."""
    counts = metadata.get(f"{metadata.get('general.architecture', '')}.attention.head_count_kv")
    layers = range(len(counts)) if isinstance(counts, list) else range(1)
    return max(layers, key=lambda layer: _number(metadata, "attention.head_count_kv", layer), default=0)


def _heads(metadata: Metadata, layer: int) -> tuple[int, int, int]:
    """Heads of keys and values in a layer, and the length of a key and of a value."""
    heads = _number(metadata, "attention.head_count", layer)
    width = _number(metadata, "embedding_length") // max(heads, 1)
    keys = _number(metadata, "attention.key_length") or width
    values = _number(metadata, "attention.value_length") or width
    if _sees_window(metadata, layer):
        keys = _number(metadata, "attention.key_length_swa") or keys
        values = _number(metadata, "attention.value_length_swa") or values
    return _number(metadata, "attention.head_count_kv", layer) or heads, keys, values


def _cache_elements(metadata: Metadata, layer: int) -> int:
    """Keys and values of one token in one layer; latent attention keeps its values inside its keys."""
    heads, keys, values = _heads(metadata, layer)
    return heads * (keys if _number(metadata, "attention.key_length_mla") else keys + values)


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


def _largest(metadata: Metadata, suffix: str) -> int:
    """The same of a list of layers, its largest."""
    value = metadata.get(f"{metadata.get('general.architecture', '')}.{suffix}", 0)
    layers = len(value) if isinstance(value, list) else 1
    return max((_number(metadata, suffix, layer) for layer in range(layers)), default=0)
