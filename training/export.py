"""Writes a checkpoint as an F16 GGUF that stock llama.cpp loads.

Types follow llama.cpp's own converter: matrices in F16, everything 1-D or belonging to the recurrence or the
router in F32. The few tensors whose shape or value differs are in `gguf_tensors`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from model import Config

ARCH = "granitehybrid"
KEEP_F32 = ("ssm_conv1d", "ssm_norm", "ffn_gate_inp")


def gguf_tensors(state: dict[str, torch.Tensor]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (GGUF name, value) of every tensor as llama.cpp wants it.

    It wants A itself and not its logarithm, A, D and the gated norm as 2-D, and the convolution without its
    middle dimension.
    """
    for name, tensor in state.items():
        value = tensor.float().numpy()
        if name.endswith("ssm_a_log"):
            name = name.removesuffix("_log")
            value = -np.exp(value)[:, None]
        elif name.endswith("ssm_d"):
            value = value[:, None]
        elif name.endswith("ssm_dt_bias"):
            name = name.replace("ssm_dt_bias", "ssm_dt.bias")
        elif name.endswith("ssm_conv1d.weight"):
            value = value[:, 0]
        elif name.endswith("ssm_norm.weight"):
            value = value[None]
        matrix = value.ndim > 1 and name.endswith(".weight") and not any(k in name for k in KEEP_F32)
        yield name, np.ascontiguousarray(value, dtype=np.float16 if matrix else np.float32)


def add_shape(w: gguf.GGUFWriter, c: Config) -> None:
    """Writes the keys that say how large the model is; layers without attention have no key heads."""
    kv_heads = [c.n_head_kv if i in c.attention_layers else 0 for i in range(c.n_layer)]
    w.add_vocab_size(c.n_vocab)
    w.add_context_length(4096)
    w.add_embedding_length(c.n_embd)
    w.add_block_count(c.n_layer)
    w.add_feed_forward_length(c.n_ff_exp)
    w.add_head_count(c.n_head)
    w.add_head_count_kv(kv_heads)
    w.add_layer_norm_rms_eps(c.rms_eps)
    w.add_expert_count(c.n_expert)
    w.add_expert_used_count(c.n_expert_used)
    w.add_expert_shared_feed_forward_length(c.n_ff_shexp)


def add_granite(w: gguf.GGUFWriter, c: Config) -> None:
    """Writes the multipliers and the recurrent part.

    `rope.scaling.finetuned = false` is how llama.cpp spells that the model has no rotary positions.
    """
    w.add_rope_dimension_count(c.d_head)
    w.add_rope_scaling_finetuned(False)
    w.add_embedding_scale(c.embedding_scale)
    w.add_residual_scale(c.residual_scale)
    w.add_attention_scale(c.attention_scale)
    w.add_logit_scale(c.logit_scale)
    w.add_ssm_conv_kernel(c.d_conv)
    w.add_ssm_inner_size(c.d_inner)
    w.add_ssm_state_size(c.d_state)
    w.add_ssm_group_count(1)
    w.add_ssm_time_step_rank(c.n_ssm_head)


def add_tokenizer(w: gguf.GGUFWriter, path: Path) -> None:
    """Writes the vocabulary and its merges from a tokenizer.json; the first special token begins and ends a
    text.
    """
    spec = json.loads(path.read_text("utf-8"))
    special = {t["id"] for t in spec["added_tokens"]}
    tokens = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].__getitem__)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(tokens)
    w.add_token_types(
        [gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(len(tokens))]
    )
    w.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]])
    w.add_bos_token_id(min(special))
    w.add_eos_token_id(min(special))
    w.add_add_bos_token(False)


def add_names(w: gguf.GGUFWriter, n_parameters: int) -> None:
    """Writes who made the model, under which licence, and what it is for."""
    millions = f"{n_parameters / 1e6:.0f}M"
    w.add_type("model")
    w.add_name(f"Cerebellum Demo {millions}")
    w.add_author("The Cerebellum authors")
    w.add_license("apache-2.0")
    w.add_size_label(millions)
    w.add_description(
        "A miniature of the Granite-4.0-H shape, trained on Wikipedia text to try Cerebellum with."
    )
    w.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    w.add_quantization_version(gguf.GGML_QUANT_VERSION)


def write(checkpoint: dict, tokenizer: Path, out: Path) -> None:
    """Writes the GGUF beside its place and renames it, so that a reader never sees half a file."""
    config = Config(**checkpoint["config"])
    tensors = list(gguf_tensors(checkpoint["model"]))
    beside = out.with_name(out.name + ".part")
    writer = gguf.GGUFWriter(beside, ARCH)
    add_names(writer, sum(v.size for _, v in tensors))
    add_shape(writer, config)
    add_granite(writer, config)
    add_tokenizer(writer, tokenizer)
    for name, value in tensors:
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(beside, out)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("checkpoint", type=Path)
    p.add_argument("tokenizer", type=Path, help="tokenizer.json")
    p.add_argument("out", type=Path)
    a = p.parse_args()
    write(torch.load(a.checkpoint, map_location="cpu", weights_only=True), a.tokenizer, a.out)
    print(f"{a.out}: {a.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
