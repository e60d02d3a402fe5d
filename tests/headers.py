"""Headers of small models in several families: right names and shapes, and files that are all hole.

Names and shapes are those that src/models/*.cpp of llama.cpp load; `no_vocab` needs no vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from odd_gguf import any_kv
from sparse import F16, F32, Meta, V

from cerebellum.files import atomic_writer
from cerebellum.gguf import encode_header, gguf_size


@dataclass(frozen=True, kw_only=True)
class Model:
    """Layout of a transformer; experts of 0 is a dense one."""

    architecture: str
    vocabulary: int = 32_000
    layers: int = 2
    width: int = 1024
    heads: int = 16
    heads_kv: int = 4
    head: int = 64
    inner: int = 4096
    experts: int = 0
    used: int = 0
    window: int = 0
    pattern: tuple[bool, ...] = ()
    tied: bool = True


def write_header(path: Path, model: Model) -> Path:
    """A GGUF of zeros that take no room on the disk."""
    records = [any_kv(key, *_typed(value)) for key, value in facts(model).items()]
    tensors = list(_tensors(model))
    with atomic_writer(path) as stream:
        stream.write(encode_header(records, tensors))
        stream.truncate(gguf_size(records, tensors))
    return path


def facts(model: Model) -> dict[str, Any]:
    """The metadata, short enough to be ``plain_metadata`` too."""
    own: dict[str, Any] = {
        "block_count": model.layers,
        "context_length": 131_072,
        "embedding_length": model.width,
        "feed_forward_length": model.inner,
        "vocab_size": model.vocabulary,
        "attention.head_count": model.heads,
        "attention.head_count_kv": model.heads_kv,
        "attention.key_length": model.head,
        "attention.value_length": model.head,
        "attention.layer_norm_rms_epsilon": 1e-6,
    }
    if model.experts:
        own |= {"expert_count": model.experts, "expert_used_count": model.used}
        own |= {"expert_feed_forward_length": model.inner}
    if model.window:
        own |= {"attention.sliding_window": model.window}
    if model.pattern:
        own |= {"attention.sliding_window_pattern": list(model.pattern)}
    named = {f"{model.architecture}.{key}": value for key, value in own.items()}
    return {"general.architecture": model.architecture, "tokenizer.ggml.model": "no_vocab"} | named


def _typed(value: Any) -> tuple[Any, ...]:
    if isinstance(value, list):
        return value, V.ARRAY, V.BOOL
    return value, {str: V.STRING, int: V.UINT32, float: V.FLOAT32}[type(value)]


def _tensors(model: Model) -> Iterator[Meta]:
    yield Meta(name="token_embd.weight", shape=(model.width, model.vocabulary), type=F16)
    yield Meta(name="output_norm.weight", shape=(model.width,), type=F32)
    if not model.tied:
        yield Meta(name="output.weight", shape=(model.width, model.vocabulary), type=F16)
    for layer in range(model.layers):
        for name, shape in {**_attention(model), **_feed_forward(model)}.items():
            kind = F32 if len(shape) == 1 or "gate_inp" in name else F16
            yield Meta(name=f"blk.{layer}.{name}", shape=shape, type=kind)


def _attention(model: Model) -> Mapping[str, tuple[int, ...]]:
    queries, keys = model.heads * model.head, model.heads_kv * model.head
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (model.width,),
        "attn_q.weight": (model.width, queries),
        "attn_k.weight": (model.width, keys),
        "attn_v.weight": (model.width, keys),
        "attn_output.weight": (queries, model.width),
    }
    if model.architecture in ("qwen3", "qwen3moe", "gemma3"):
        shapes |= {"attn_q_norm.weight": (model.head,), "attn_k_norm.weight": (model.head,)}
    if model.architecture in ("gemma2", "gemma3"):
        shapes |= {"post_attention_norm.weight": (model.width,), "post_ffw_norm.weight": (model.width,)}
    return shapes


def _feed_forward(model: Model) -> Mapping[str, tuple[int, ...]]:
    wide, narrow = (model.width, model.inner), (model.inner, model.width)
    norm: dict[str, tuple[int, ...]] = {"ffn_norm.weight": (model.width,)}
    if not model.experts:
        return norm | {"ffn_gate.weight": wide, "ffn_up.weight": wide, "ffn_down.weight": narrow}
    return norm | {
        "ffn_gate_inp.weight": (model.width, model.experts),
        "ffn_gate_exps.weight": (*wide, model.experts),
        "ffn_up_exps.weight": (*wide, model.experts),
        "ffn_down_exps.weight": (*narrow, model.experts),
    }
