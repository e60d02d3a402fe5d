"""Computes how much GPU memory a model needs from its metadata: weights, cache, state and compute.

The formulas are llama.cpp's at its defaults: F16 cache, F32 state, flash attention, batches of 512 tokens
and all layers on the GPU. They follow `llama_kv_cache` (src/llama-kv-cache.cpp) and `llama_memory_recurrent`
with `n_embd_r` and `n_embd_s` (src/llama-hparams.cpp). Two of them are upper bounds. The cache counts every
attention layer as one that sees the whole context: which layers see only a sliding window is llama.cpp's
business and changes with its versions. The compute buffer depends on what can take whose place in a graph.
``ask`` replaces both with what llama.cpp itself says it would allocate.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cerebellum.errors import AnswerIsNo
from cerebellum.source import Metadata
from cerebellum.units import gib

GPUS_GIB = (8, 12, 16, 24)
"""Memory sizes of the GPUs that people have at home, in GiB; the model card has a column for each."""

RESERVE_BYTES = 512 << 20
"""Bytes that the driver and a display take of a GPU before any model is loaded: a round guess."""

SERVER_SEQUENCES = 4
"""Slots of llama-server without `-np`. They share one cache; each has a recurrent state of its own."""

CELLS = 256
"""llama.cpp pads a cache to a multiple of so many tokens, so contexts between are not worth asking for."""

_CACHE_BYTES = 2  # an F16 key or value
_STATE_BYTES = 4  # an F32 value of a recurrent state
_VALUE_BYTES = 4  # an F32 activation or logit
_MASK_BYTES = 2  # an F16 entry of the attention mask
_BATCH_TOKENS = 512  # llama.cpp's n_ubatch
_GIB = 1 << 30
_LOG_BYTES = (1 << 20) // 64  # llama.cpp logs two buffers, each in hundredths of a MiB
_INPUTS = ("token_embd.weight", "per_layer_token_embd.weight", "position_embd.weight", "token_types.weight")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on the GPU for a context of ``context`` tokens that ``sequences`` conversations share.

    ``asked`` says that cache, state and compute are llama.cpp's own figures for this machine's GPU; without
    it, compute is the larger of our bound and what llama.cpp needs on the CPU. ``cache_asked`` says the same
    of cache and state alone, which do not depend on the device.
    """

    context: int
    weights: int
    cache: int
    state: int
    compute: int
    sequences: int = 1
    asked: bool = False
    cache_asked: bool = False

    @property
    def beside_weights(self) -> int:
        """Bytes of everything but the weights, so what a plan cannot make smaller."""
        return self.cache + self.state + self.compute

    @property
    def total(self) -> int:
        """Bytes of weights, cache, state and compute, without what the driver takes."""
        return self.weights + self.beside_weights

    def runs_on(self, gpu_gib: int) -> bool:
        """Says whether all of it goes on a GPU of ``gpu_gib`` GiB with ``RESERVE_BYTES`` set aside."""
        return self.total + RESERVE_BYTES <= gpu_gib * _GIB


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Holds what the memory of a model depends on, read off its metadata once.

    ``weights`` are bytes on the GPU; ``cache_bytes_per_token`` counts all attention layers; ``state`` is the
    bytes of one conversation in all recurrent layers; ``vocabulary`` is in tokens; ``activations`` is how
    many values one token has at the widest layer. ``window`` is the sliding window in tokens that the file
    names for some of its layers, 0 where it names none: with one, the cache is an upper bound.
    """

    weights: int
    cache_bytes_per_token: int
    window: int
    state: int
    vocabulary: int
    activations: int
    attention_layers: int
    recurrent_layers: int

    def at(self, context: int, sequences: int = 1) -> Memory:
        """Returns the memory for ``context`` tokens that ``sequences`` conversations share."""
        cells = -(-context // CELLS) * CELLS
        return Memory(
            context=context,
            sequences=sequences,
            weights=self.weights,
            cache=self.cache_bytes_per_token * cells,
            state=self.state * sequences,
            compute=self._compute(min(context, _BATCH_TOKENS), cells, sequences),
        )

    def _compute(self, tokens: int, cells: int, sequences: int) -> int:
        """Bounds a batch's logits, masks and widest layer, as if none of them could reuse another's room.

        A model with windows has a second mask, which is never larger than the first.
        """
        masks = 2 if self.window else 1
        mask = masks * _MASK_BYTES * cells if self.attention_layers else 0
        values = _VALUE_BYTES * (self.vocabulary + self.activations)
        layer_state = self.state * sequences // max(self.recurrent_layers, 1)
        return tokens * (values + mask) + 2 * layer_state  # the state before and after


def ask(shape: Shape, paths: Sequence[Path], context: int, sequences: int = 1) -> Memory:
    """Returns ``shape.at`` with the bytes that llama.cpp says it allocates; the weights stay the shape's.

    llama.cpp reads only the header of the files at ``paths``. Without a GPU in this machine it tells the
    CPU's compute buffer. A GPU's may be larger, because less of it can be reused, so our bound stands there
    if it is the larger one. Raises BadInput where llama.cpp cannot open the files.
    """
    from cerebellum.llama.allocation import memory_report  # whoever only reads a run loads no engine

    memory = shape.at(context, sequences)
    said = memory_report(paths, context, sequences=sequences)
    return replace(
        memory,
        cache=_exact(memory.cache, said.cache),
        state=_exact(memory.state, said.state),
        compute=said.compute if said.on_gpu else max(said.compute, memory.compute),
        asked=said.on_gpu,
        cache_asked=True,
    )


def _exact(n_bytes: int, said: int) -> int:
    """Returns the formula's exact bytes where llama.cpp says the same but for the rounding of its log."""
    return n_bytes if abs(n_bytes - said) <= _LOG_BYTES else said


def weights_budget(
    shape: Shape, memory: Memory, gpu_bytes: int, *, at_least: int = 1, reserve_bytes: int = RESERVE_BYTES
) -> int:
    """Returns the bytes of tensors that go on a GPU of ``gpu_bytes`` beside the rest of ``memory``.

    A file may be larger than that: by its header, and by the tensors that are ``off_the_gpu``. Raises
    AnswerIsNo where fewer than ``at_least`` bytes are left, with the context or the GPU that would do.
    """
    left = gpu_bytes - reserve_bytes - memory.beside_weights
    if left >= at_least:
        return left
    room = gpu_bytes - reserve_bytes - at_least
    longest = largest_context(shape, room, memory.context - 1, memory.sequences)
    instead = f"a context of {longest:,} tokens or " if longest else ""
    raise AnswerIsNo(
        f"{gib(gpu_bytes)} is too little at {memory.context:,} tokens: cache {gib(memory.cache)}, state "
        f"{gib(memory.state)}, compute {gib(memory.compute)} and {gib(reserve_bytes)} set aside leave "
        f"{gib(max(left, 0))} for weights that take at least {gib(at_least)}; {instead}"
        f"a GPU of {-((left - at_least - gpu_bytes) // _GIB)} GiB would do"
    )


def largest_context(shape: Shape, room_bytes: int, below: int, sequences: int = 1) -> int:
    """Returns the most tokens for which all but the weights takes ``room_bytes`` at most, or 0 for none.

    The answer is a multiple of ``CELLS`` and at most ``below``. It follows from the formulas, so for a model
    with windows a longer context may be possible.
    """
    enough = 0
    too_many = below // CELLS + 1
    while too_many - enough > 1:
        middle = (enough + too_many) // 2
        if shape.at(middle * CELLS, sequences).beside_weights <= room_bytes:
            enough = middle
        else:
            too_many = middle
    return enough * CELLS


def off_the_gpu(tensor_names: Collection[str]) -> frozenset[str]:
    """Returns the tensors that llama.cpp keeps in main memory with all layers on the GPU: input embeddings.

    An input embedding that is the output too (tied) goes on the GPU and a second time into main memory, so
    it is not among them.
    """
    tied = "output.weight" not in tensor_names
    return frozenset(_INPUTS[1:] if tied else _INPUTS) & frozenset(tensor_names)


def memory_json(
    shape: Shape, memory: Memory, gpu_bytes: int, reserve_bytes: int = RESERVE_BYTES
) -> dict[str, int | str]:
    """Returns everything on the GPU in bytes, part by part; ``free`` is negative where it does not fit.

    ``card`` is the GPU's memory. ``compute_from`` and ``cache_from`` say whether a figure is llama.cpp's own
    or our bound; a cache without windows is exact either way.
    """
    return {
        "context": memory.context,
        "sequences": memory.sequences,
        "weights": memory.weights,
        "cache": memory.cache,
        "cache_bytes_per_token": shape.cache_bytes_per_token,
        "cache_from": "llama.cpp" if memory.cache_asked else "bound" if shape.window else "formula",
        "attention_layers": shape.attention_layers,
        "window": shape.window,
        "state": memory.state,
        "recurrent_layers": shape.recurrent_layers,
        "server_sequences": SERVER_SEQUENCES,
        "compute": memory.compute,
        "compute_from": "llama.cpp" if memory.asked else "bound",
        "reserve": reserve_bytes,
        "total": memory.total + reserve_bytes,
        "card": gpu_bytes,
        "free": gpu_bytes - memory.total - reserve_bytes,
    }


def memory_shape(
    metadata: Metadata, attention_layers: Sequence[int], n_recurrent: int, weights: int
) -> Shape:
    """Reads the shape off ``source.plain_metadata``; ``weights`` are the bytes of the tensors on the GPU.

    ``attention_layers`` are layer numbers from 0, ``n_recurrent`` counts the layers with a state.
    """
    counts = _Counts(metadata)
    cached = sum(_cache_elements(counts, layer) for layer in attention_layers)
    return Shape(
        weights=weights,
        cache_bytes_per_token=_CACHE_BYTES * cached,
        window=_window(counts) if attention_layers else 0,
        state=_STATE_BYTES * n_recurrent * _state_elements(counts),
        vocabulary=counts.of("vocab_size") or counts.bare("vocabulary"),
        activations=max(_activations(counts), default=0),
        attention_layers=len(attention_layers),
        recurrent_layers=n_recurrent,
    )


def contexts(full: int) -> tuple[int, ...]:
    """Returns the context lengths worth a row on a card: 4K, 32K and ``full``, all that the model has."""
    return tuple(sorted({n for n in (4096, 32768) if n < full} | {full})) if full else (4096,)


def ignores_window(metadata: Metadata) -> bool:
    """Says whether the file names a sliding window, so that the formulas' cache is an upper bound only."""
    return _window(_Counts(metadata)) > 0


def _window(counts: _Counts) -> int:
    return counts.of("attention.sliding_window")


@dataclass(frozen=True)
class _Counts:
    """Reads an architecture's own whole numbers out of metadata: one for the model, or one for each layer."""

    metadata: Metadata

    def of(self, suffix: str, layer: int = 0) -> int:
        """Returns the count at `<architecture>.<suffix>`, of a list the layer's own, or 0 for none."""
        value = self._value(suffix)
        if isinstance(value, list):
            value = value[layer] if layer < len(value) else 0
        return int(value) if isinstance(value, int | float) else 0

    def largest(self, suffix: str) -> int:
        """Returns the largest of a list of layers, or the count itself where it is one for all of them."""
        return max((self.of(suffix, layer) for layer in range(self.layers(suffix))), default=0)

    def layers(self, suffix: str) -> int:
        """Returns how many layers the value at ``suffix`` tells apart: 1 where it is one for all."""
        value = self._value(suffix)
        return len(value) if isinstance(value, list) else 1

    def bare(self, key: str) -> int:
        """Returns the count at a key without the architecture's name, 0 where there is none."""
        value = self.metadata.get(key, 0)
        return value if isinstance(value, int) else 0

    def _value(self, suffix: str) -> object:
        return self.metadata.get(f"{self.metadata.get('general.architecture', '')}.{suffix}", 0)


def _activations(counts: _Counts) -> Iterator[int]:
    """Yields how many values one token has at once in each sort of layer, as an upper bound.

    Six times the residual stream's width and once the queries' stand for what every layer holds and for the
    gaps that leaves. The rest is read off the graphs of src/llama-graph.cpp and src/models: queries, keys,
    values and their result; gate, up and product of a feed-forward layer, and of each expert used, with its
    result or that and its weighted copy; the projections, convolution, scan and gate of a recurrent layer.
    """
    width = counts.of("embedding_length")
    heads, keys, values = _heads(counts, _widest_layer(counts))
    queries = counts.largest("attention.head_count") * max(keys, values)
    common = 6 * width + queries
    yield common + 3 * queries + 2 * heads * (keys + values)
    yield common + 3 * counts.largest("feed_forward_length")
    yield common + _expert_activations(counts, width)
    yield common + _recurrent_activations(counts, width)


def _expert_activations(counts: _Counts, width: int) -> int:
    used = counts.of("expert_used_count")
    inner = counts.largest("expert_feed_forward_length") or counts.largest("feed_forward_length")
    shared = 3 * counts.largest("expert_shared_feed_forward_length")
    return used * (width + max(3 * inner, width)) + shared + 3 * counts.of("expert_count")


def _recurrent_activations(counts: _Counts, width: int) -> int:
    inner = counts.of("ssm.inner_size")
    if not inner:
        return 12 * width if _state_elements(counts) else 0
    mixed = inner + 2 * counts.of("ssm.group_count") * counts.of("ssm.state_size")
    return 5 * inner + 3 * mixed + counts.of("ssm.time_step_rank")


def _widest_layer(counts: _Counts) -> int:
    """Returns the layer with the most heads for keys and values; a hybrid's other layers have none."""
    layers = range(counts.layers("attention.head_count_kv"))
    return max(layers, key=lambda layer: counts.of("attention.head_count_kv", layer), default=0)


def _heads(counts: _Counts, layer: int) -> tuple[int, int, int]:
    """Returns the heads of keys and values in a layer, then the elements of one key and of one value.

    Some models give windowed layers lengths of their own (`_swa`); the longer one holds for all of them.
    """
    heads = counts.of("attention.head_count", layer)
    width = counts.of("embedding_length") // max(heads, 1)
    keys = counts.of("attention.key_length") or width
    values = counts.of("attention.value_length") or width
    return (
        counts.of("attention.head_count_kv", layer) or heads,
        max(keys, counts.of("attention.key_length_swa")),
        max(values, counts.of("attention.value_length_swa")),
    )


def _cache_elements(counts: _Counts, layer: int) -> int:
    """Returns the key and value elements of one token; latent attention keeps its values inside its keys."""
    heads, keys, values = _heads(counts, layer)
    return heads * (keys if counts.of("attention.key_length_mla") else keys + values)


def _state_elements(counts: _Counts) -> int:
    """Returns what one recurrent layer remembers of one conversation, in elements.

    Mamba keeps a convolution and a state, RWKV shifted tokens and a state, a short convolution its inputs.
    """
    if inner := counts.of("ssm.inner_size"):
        state = counts.of("ssm.state_size")
        mixed = inner + 2 * counts.of("ssm.group_count") * state
        return (counts.of("ssm.conv_kernel") - 1) * mixed + state * inner
    width = counts.of("embedding_length")
    if head := counts.of("wkv.head_size"):
        return width * (head + (counts.of("token_shift_count") or 2))
    return width * max(counts.of("shortconv.l_cache") - 1, 0)
