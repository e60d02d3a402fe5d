"""A sparse GGUF with granite-4.0-h-small's metadata and shapes: 60 GiB that take a few MB.

Names, shapes and types are those of llama.cpp's converter (conversion/granite.py, mamba.py:
matrices in F16; norms, routers, ssm_a, ssm_d, conv1d and dt bias in F32) as
src/models/granite-hybrid.cpp loads them. llama-quantize's own dry run on this file gives the published
14,645.13 MiB for Q3_K_M. The vocabulary is synthetic and of the real size, so
that reading the header costs what it costs.

The context length is the model's own 131,072; today's converter would write 2**20 for want of rope.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from odd_gguf import any_kv

from cerebellum.files import atomic_writer
from cerebellum.gguf import GGMLQuantizationType, GGUFValueType, encode_header, encode_kv, gguf_size

N_LAYERS = 40
ATTENTION_LAYERS = (5, 15, 25, 35)
N_EMBD, N_VOCAB = 4096, 100_352
N_HEADS, N_HEADS_KV, N_HEAD_DIM = 32, 8, 128
N_EXPERTS, N_EXPERTS_USED, N_FF_EXPERT, N_FF_SHARED = 72, 10, 768, 1536
N_INNER, N_STATE, N_SSM_HEADS, N_SSM_GROUPS, N_CONV = 8192, 128, 128, 1, 4

V = GGUFValueType
F16, F32 = GGMLQuantizationType.F16, GGMLQuantizationType.F32


@dataclass(frozen=True, kw_only=True)
class Meta:
    """A tensor with no bytes of its own."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType


def write_sparse_granite(path: str | Path) -> Path:
    """Write the file at `path` (all weights zero, none on the disk) and return the path."""
    records, tensors = granite_records(), granite_tensors()
    with atomic_writer(path) as stream:
        stream.write(encode_header(records, tensors))
        stream.truncate(gguf_size(records, tensors))
    return Path(path)


def granite_tensors() -> list[Meta]:
    """Return the 666 tensors of granite-4.0-h-small in F16, as converted."""
    tensors = [Meta(name="token_embd.weight", shape=(N_EMBD, N_VOCAB), type=F16)]
    for layer in range(N_LAYERS):
        mixer = _attention() if layer in ATTENTION_LAYERS else _mamba()
        for rest, shape, type_ in (*mixer, *_feed_forward()):
            tensors.append(Meta(name=f"blk.{layer}.{rest}", shape=shape, type=type_))
    tensors.append(Meta(name="output_norm.weight", shape=(N_EMBD,), type=F32))
    return tensors


def _attention() -> Iterator[tuple[str, tuple[int, ...], GGMLQuantizationType]]:
    yield "attn_norm.weight", (N_EMBD,), F32
    yield "attn_q.weight", (N_EMBD, N_HEADS * N_HEAD_DIM), F16
    yield "attn_k.weight", (N_EMBD, N_HEADS_KV * N_HEAD_DIM), F16
    yield "attn_v.weight", (N_EMBD, N_HEADS_KV * N_HEAD_DIM), F16
    yield "attn_output.weight", (N_HEADS * N_HEAD_DIM, N_EMBD), F16


def _mamba() -> Iterator[tuple[str, tuple[int, ...], GGMLQuantizationType]]:
    n_conv_channels = N_INNER + 2 * N_SSM_GROUPS * N_STATE
    yield "attn_norm.weight", (N_EMBD,), F32
    yield "ssm_a", (1, N_SSM_HEADS), F32
    yield "ssm_d", (1, N_SSM_HEADS), F32
    yield "ssm_conv1d.weight", (N_CONV, n_conv_channels), F32
    yield "ssm_conv1d.bias", (n_conv_channels,), F32
    yield "ssm_dt.bias", (N_SSM_HEADS,), F32
    yield "ssm_in.weight", (N_EMBD, N_INNER + n_conv_channels + N_SSM_HEADS), F16
    yield "ssm_norm.weight", (N_INNER // N_SSM_GROUPS, N_SSM_GROUPS), F32
    yield "ssm_out.weight", (N_INNER, N_EMBD), F16


def _feed_forward() -> Iterator[tuple[str, tuple[int, ...], GGMLQuantizationType]]:
    yield "ffn_norm.weight", (N_EMBD,), F32
    yield "ffn_gate_inp.weight", (N_EMBD, N_EXPERTS), F32
    yield "ffn_gate_exps.weight", (N_EMBD, N_FF_EXPERT, N_EXPERTS), F16
    yield "ffn_up_exps.weight", (N_EMBD, N_FF_EXPERT, N_EXPERTS), F16
    yield "ffn_down_exps.weight", (N_FF_EXPERT, N_EMBD, N_EXPERTS), F16
    yield "ffn_gate_shexp.weight", (N_EMBD, N_FF_SHARED), F16
    yield "ffn_up_shexp.weight", (N_EMBD, N_FF_SHARED), F16
    yield "ffn_down_shexp.weight", (N_FF_SHARED, N_EMBD), F16


def granite_records() -> list[bytes]:
    """Return the metadata: the model's own numbers and a synthetic vocabulary of its size."""
    arch = "granitehybrid"
    heads_kv = [N_HEADS_KV if layer in ATTENTION_LAYERS else 0 for layer in range(N_LAYERS)]
    tokens = [f"token{number:06d}" for number in range(N_VOCAB)]
    merges = [f"tok en{number:06d}" for number in range(N_VOCAB - 352)]
    return [
        encode_kv("general.architecture", arch, V.STRING),
        encode_kv("general.type", "model", V.STRING),
        encode_kv("general.name", "Granite 4.0 H Small", V.STRING),
        encode_kv("general.file_type", 1, V.UINT32),
        encode_kv("general.quantization_version", 2, V.UINT32),
        encode_kv(f"{arch}.block_count", N_LAYERS, V.UINT32),
        encode_kv(f"{arch}.context_length", 131_072, V.UINT32),
        encode_kv(f"{arch}.embedding_length", N_EMBD, V.UINT32),
        encode_kv(f"{arch}.feed_forward_length", N_FF_EXPERT, V.UINT32),
        encode_kv(f"{arch}.vocab_size", N_VOCAB, V.UINT32),
        encode_kv(f"{arch}.attention.head_count", N_HEADS, V.UINT32),
        any_kv(f"{arch}.attention.head_count_kv", heads_kv, V.ARRAY, V.INT32),
        any_kv(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5, V.FLOAT32),
        any_kv(f"{arch}.attention.scale", 1 / N_HEAD_DIM, V.FLOAT32),
        any_kv(f"{arch}.embedding_scale", 12.0, V.FLOAT32),
        any_kv(f"{arch}.residual_scale", 0.22, V.FLOAT32),
        any_kv(f"{arch}.logit_scale", 16.0, V.FLOAT32),
        encode_kv(f"{arch}.rope.dimension_count", N_HEAD_DIM, V.UINT32),
        any_kv(f"{arch}.rope.freq_base", 10_000.0, V.FLOAT32),
        any_kv(f"{arch}.rope.scaling.finetuned", False, V.BOOL),
        encode_kv(f"{arch}.expert_count", N_EXPERTS, V.UINT32),
        encode_kv(f"{arch}.expert_used_count", N_EXPERTS_USED, V.UINT32),
        encode_kv(f"{arch}.expert_shared_feed_forward_length", N_FF_SHARED, V.UINT32),
        encode_kv(f"{arch}.ssm.conv_kernel", N_CONV, V.UINT32),
        encode_kv(f"{arch}.ssm.state_size", N_STATE, V.UINT32),
        encode_kv(f"{arch}.ssm.group_count", N_SSM_GROUPS, V.UINT32),
        encode_kv(f"{arch}.ssm.inner_size", N_INNER, V.UINT32),
        encode_kv(f"{arch}.ssm.time_step_rank", N_SSM_HEADS, V.UINT32),
        encode_kv("tokenizer.ggml.model", "gpt2", V.STRING),
        encode_kv("tokenizer.ggml.pre", "dbrx", V.STRING),
        encode_kv("tokenizer.ggml.tokens", tokens, V.ARRAY),
        any_kv("tokenizer.ggml.token_type", [1] * N_VOCAB, V.ARRAY, V.INT32),
        encode_kv("tokenizer.ggml.merges", merges, V.ARRAY),
        encode_kv("tokenizer.ggml.bos_token_id", 100_257, V.UINT32),
        encode_kv("tokenizer.ggml.eos_token_id", 100_257, V.UINT32),
    ]
