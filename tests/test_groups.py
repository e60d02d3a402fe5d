"""Sources and groups: a real 32B hybrid by its header, other families by their names, refusals."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from odd_gguf import any_kv
from sparse import write_sparse_granite

from cerebellum.codec import Artifact, Record, as_json, read_artifact, write_artifact
from cerebellum.errors import BadInput
from cerebellum.files import fingerprint_files
from cerebellum.gguf import (
    GGMLQuantizationType,
    GGUFValueType,
    TensorSource,
    encode_kv,
    read_gguf,
    tensor_bytes,
    write_gguf,
)
from cerebellum.groups import (
    Groups,
    SourceFile,
    describe,
    is_protected,
    layer_of,
    make_groups,
    record_of,
    role_of,
    source_file,
)
from cerebellum.source import Source, open_source

T, V = GGMLQuantizationType, GGUFValueType


@pytest.fixture(scope="module")
def granite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sparse_granite(tmp_path_factory.mktemp("granite") / "granite-4.0-h-small.gguf")


def write_model(
    path: Path,
    architecture: str | None,
    tensors: Mapping[str, tuple[int, ...]],
    type_: GGMLQuantizationType = T.F16,
    /,
    **metadata: tuple[Any, ...],
) -> Path:
    """Write a model of zeros: tensors by name and shape, metadata by key (`__` stands for `.`)."""
    records = []
    if architecture is not None:
        records.append(encode_kv("general.architecture", architecture, V.STRING))
    for key, value in metadata.items():
        name = key.replace("__", ".")
        name = name if name.partition(".")[0] in ("general", "split") else f"{architecture}.{name}"
        records.append(any_kv(name, *value))
    sources = [
        TensorSource(
            name=name,
            shape=shape,
            type=type_,
            chunks=lambda shape=shape: [bytes(tensor_bytes(type_, shape))],  # type: ignore[misc]
        )
        for name, shape in tensors.items()
    ]
    write_gguf(path, records, sources)
    return path


# ---- granite-4.0-h-small ----


def test_the_32b_hybrid_is_described_from_its_header(granite: Path) -> None:
    assert granite.stat().st_size > 60 << 30
    assert granite.stat().st_blocks * 512 < 32 << 20
    started = time.monotonic()
    source = open_source(granite)
    found = plain(describe(source, make_groups(source)))
    seconds = time.monotonic() - started
    print(f"described in {seconds:.3f} s")
    assert seconds < 10
    assert json.loads(json.dumps(found)) == found

    groups = found.pop("groups")
    assert found == {
        "architecture": "granitehybrid",
        "name": "Granite 4.0 H Small",
        "parameters": 32_207_337_984,
        "active_parameters": 8_803_121_664,
        "layers": 40,
        "experts": 72,
        "experts_used": 10,
        "attention_layers": [5, 15, 25, 35],
        "recurrent_layers": 36,
        "context_length": 131_072,
        "bytes": granite.stat().st_size,
    }
    assert {g["name"]: g["tensors"] for g in groups if not g["protected"]} == {
        "ffn_gate_shexp": 40,
        "ffn_up_shexp": 40,
        "ffn_down_shexp": 40,
        "ffn_gate_exps": 40,
        "ffn_up_exps": 40,
        "ffn_down_exps": 40,
        "ssm_in": 36,
        "ssm_out": 36,
        "attn_q": 4,
        "attn_k": 4,
        "attn_v": 4,
        "attn_output": 4,
    }
    assert {g["name"] for g in groups if g["protected"]} == {
        "token_embd",
        "output_norm",
        "attn_norm",
        "ffn_norm",
        "ffn_gate_inp",
        "ssm_a",
        "ssm_d",
        "ssm_conv1d",
        "ssm_conv1d.bias",
        "ssm_dt.bias",
        "ssm_norm",
    }
    by_name = {g["name"]: g for g in groups}
    ssm_in = by_name["ssm_in"]
    assert ssm_in["layers"] == [n for n in range(40) if n not in (5, 15, 25, 35)]
    assert ssm_in["tensor_names"][0] == "blk.0.ssm_in.weight"
    assert ssm_in["types"] == {"F16": 36}
    assert ssm_in["bytes"] == 2 * ssm_in["parameters"] == 36 * 4096 * 16768 * 2
    assert "Q2_K" in ssm_in["legal_types"]
    assert by_name["token_embd"]["legal_types"] == []
    assert [g["protected"] for g in groups] == sorted(g["protected"] for g in groups)


DRY_RUN = """
import ctypes, sys, llama_cpp
lines = []
@llama_cpp.llama_log_callback
def log(level, text, data): lines.append(text.decode(errors="replace"))
llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.dry_run, params.nthread = 12, True, 1
code = llama_cpp.llama_model_quantize(sys.argv[1].encode(), b"unused", ctypes.byref(params))
print(code, "".join(lines).partition("quant size")[2])
"""


def test_llama_cpp_reads_the_same_shapes_in_it(granite: Path) -> None:
    """llama-quantize's own dry run at Q3_K_M: the published figure for the real model."""
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed")
    done = subprocess.run(
        [sys.executable, "-c", DRY_RUN, str(granite)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("0 ")
    assert "14645.13 MiB" in done.stdout


def test_without_an_imatrix_fewer_types_are_legal(granite: Path) -> None:
    source = open_source(granite)
    for group in make_groups(source, has_imatrix=False):
        assert not set(group.legal_types) & {"IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"}
    assert "IQ2_XXS" in make_groups(source)[0].legal_types


# ---- names ----


@pytest.mark.parametrize(
    ("name", "role", "layer"),
    [
        ("blk.12.ffn_gate_exps.weight", "ffn_gate_exps", 12),
        ("blk.0.ssm_dt.bias", "ssm_dt.bias", 0),
        ("blk.0.ssm_a", "ssm_a", 0),
        ("enc.blk.3.attn_q.weight", "enc.attn_q", 3),
        ("blk.1.shortconv.in_proj.weight", "shortconv.in_proj", 1),
        ("token_embd.weight", "token_embd", None),
        ("output.weight", "output", None),
        ("notblk.1.x.weight", "notblk.1.x", None),
    ],
)
def test_roles_and_layers(name: str, role: str, layer: int | None) -> None:
    assert (role_of(name), layer_of(name)) == (role, layer)


PROTECTED = [
    "token_embd.weight",
    "output.weight",
    "output_norm.weight",
    "position_embd.weight",
    "token_types.weight",
    "per_layer_token_embd.weight",
    "per_layer_model_proj.weight",
    "blk.0.inp_gate.weight",
    "blk.0.proj.weight",
    "cls.weight",
    "cls.output.weight",
    "blk.0.attn_norm.weight",
    "blk.0.attn_q_norm.weight",
    "blk.0.ffn_norm_exps.weight",
    "blk.0.ffn_gate_inp.weight",
    "blk.0.ffn_gate_inp_shexp.weight",
    "blk.0.ssm_conv1d.weight",
    "blk.0.ssm_conv1d_q.weight",
    "blk.0.ssm_a",
    "blk.0.ssm_d",
    "blk.0.ssm_dt.weight",
    "blk.0.ssm_dt.bias",
    "blk.0.ffn_gate_exps.bias",
    "blk.0.ffn_up.scale",
    "blk.0.shortconv.conv.weight",
    "blk.0.time_mix_w1.weight",
    "blk.0.time_mix_decay_w1.weight",
    "blk.0.altup_router.weight",
    "blk.0.laurel_l.weight",
    "enc.blk.0.attn_rel_b.weight",
    "blk.0.ffn_gate_tid2eid.weight",
    "blk.61.nextn.embed_tokens.weight",
    "blk.61.nextn.shared_head_head.weight",
    "v.patch_embd.weight",
    "v.position_embd.weight",
    "blk.0.indexer.k_proj.weight",
]

DEMOTABLE = [
    "blk.0.attn_q.weight",
    "blk.0.attn_qkv.weight",
    "blk.0.attn_output.weight",
    "blk.0.attn_kv_a_mqa.weight",
    "blk.0.attn_k_b.weight",
    "blk.0.ffn_gate.weight",
    "blk.0.ffn_up_exps.weight",
    "blk.0.ffn_down_shexp.weight",
    "blk.0.ffn_gate_up_exps.weight",
    "blk.0.ffn_up_chexps.weight",
    "blk.0.ssm_in.weight",
    "blk.0.ssm_out.weight",
    "blk.0.ssm_x.weight",
    "blk.0.ssm_ba.weight",
    "blk.0.shortconv.in_proj.weight",
    "blk.0.time_mix_key.weight",
    "blk.0.channel_mix_value.weight",
    "enc.blk.0.ffn_up.weight",
    "dec.blk.0.cross_attn_k.weight",
    "blk.61.nextn.eh_proj.weight",
    "blk.0.ssm_f_a.weight",
]


@pytest.mark.parametrize("name", PROTECTED)
def test_protected(name: str) -> None:
    assert is_protected(name, (256, 256))


@pytest.mark.parametrize("name", DEMOTABLE)
def test_demotable(name: str) -> None:
    assert not is_protected(name, (256, 256))
    assert not is_protected(name, (256, 256, 8))
    assert is_protected(name, (256,))
    assert is_protected(name, (256, 1)), "ggml counts trailing ones as no dimension"


def test_glm5_next_has_a_list_of_its_own() -> None:
    assert is_protected("blk.0.ssm_f_a.weight", (256, 256), "glm5-next")
    assert not is_protected("blk.0.attn_q.weight", (256, 256), "glm5-next")


# ---- other families ----


def plain(value: Artifact | Record) -> Any:
    """A typed artifact as its file holds it."""
    return json.loads(json.dumps(as_json(value)))


def described(path: Path) -> dict[str, Any]:
    source = open_source(path)
    return plain(describe(source, make_groups(source)))


def test_a_dense_model(tmp_path: Path) -> None:
    found = described(
        write_model(
            tmp_path / "dense.gguf",
            "llama",
            {
                "token_embd.weight": (288, 512),
                "blk.0.attn_k.weight": (288, 96),
                "blk.0.ffn_down.weight": (768, 288),
                "blk.1.attn_k.weight": (288, 96),
                "blk.1.ffn_down.weight": (768, 288),
            },
            block_count=(2, V.UINT32),
            context_length=(2048, V.UINT32),
        )
    )
    assert found["active_parameters"] == found["parameters"]
    assert (found["experts"], found["experts_used"]) == (0, 0)
    assert (found["attention_layers"], found["recurrent_layers"]) == ([0, 1], 0)
    assert [g["name"] for g in found["groups"]] == ["attn_k", "ffn_down", "token_embd"]
    assert found["groups"][0]["legal_types"] == ["Q4_0", "IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
    assert "Q2_K" in found["groups"][1]["legal_types"]


def test_attention_and_recurrence_of_the_hybrids(tmp_path: Path) -> None:
    tensors: dict[str, tuple[int, ...]] = {
        "blk.0.attn_qkv.weight": (256, 512),  # Qwen3-Next's linear attention
        "blk.0.ssm_out.weight": (256, 256),
        "blk.1.attn_kv_a_mqa.weight": (256, 512),  # MLA
        "blk.2.attn_k.weight": (256, 256),  # Kimi Linear's delta attention: no cache of keys
        "blk.2.ssm_beta.weight": (256, 256),
        "blk.3.attn_k.weight": (256, 256),  # Falcon-H1: both at once
        "blk.3.ssm_in.weight": (256, 256),
        "blk.4.shortconv.in_proj.weight": (256, 256),  # LFM2
        "blk.5.time_mix_key.weight": (256, 256),  # RWKV
        "blk.6.ffn_up.weight": (256, 256),  # Nemotron-H: a layer that mixes nothing
        "blk.7.attn_qkv.weight": (256, 512),  # GPT-2, Phi
    }
    heads = ([1, 1, 0, 1, 0, 0, 0, 1], V.ARRAY, V.INT32)
    found = described(write_model(tmp_path / "h.gguf", "llama", tensors, attention__head_count_kv=heads))
    assert found["attention_layers"] == [1, 3, 7]
    assert found["recurrent_layers"] == 5


def test_an_encoder_and_a_decoder_keep_their_groups_apart(tmp_path: Path) -> None:
    tensors = {
        "enc.blk.0.attn_k.weight": (256, 256),
        "dec.blk.0.attn_k.weight": (256, 256),
        "dec.blk.1.attn_k.weight": (256, 256),
    }
    found = described(write_model(tmp_path / "t5.gguf", "t5", tensors, block_count=(2, V.UINT32)))
    assert [(g["name"], g["layers"]) for g in found["groups"]] == [
        ("enc.attn_k", [0]),
        ("dec.attn_k", [0, 1]),
    ]
    assert found["attention_layers"] == [0, 1]


def test_active_parameters_count_used_experts_only(tmp_path: Path) -> None:
    tensors = {
        "blk.0.attn_k.weight": (256, 256),
        "blk.0.ffn_up_exps.weight": (256, 32, 8),
        "blk.0.ffn_up_exps.bias": (32, 8),
        "blk.0.ffn_norm_exps.weight": (256,),
        "blk.0.ffn_up_shexp.weight": (256, 32),
    }
    path = write_model(
        tmp_path / "moe.gguf",
        "llama",
        tensors,
        expert_count=(8, V.UINT32),
        expert_used_count=(2, V.UINT32),
    )
    expected = 256 * 256 + (256 * 32 * 8 + 32 * 8) * 2 // 8 + 256 + 256 * 32
    assert described(path)["active_parameters"] == expected


# ---- sources ----

ONE = {"blk.0.attn_k.weight": (256, 2)}


def test_a_source_reads_and_hashes(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", "llama", ONE)
    source = open_source(path)
    assert source.name == "m"
    assert source.read("blk.0.attn_k.weight").view(np.float16).shape == (512,)
    assert source.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()
    calls: list[int] = []
    assert source.sha256(lambda done, total: calls.append(done)) == source.sha256()
    assert calls == [], "hashed once"
    assert source.header_sha256 == read_gguf(path).header_sha256
    assert not source.is_quantized
    with pytest.raises(BadInput, match="no tensor 'x'"):
        source.read("x")


def test_a_quantized_source_needs_permission(tmp_path: Path) -> None:
    path = write_model(tmp_path / "q.gguf", "llama", ONE, T.Q4_0)
    with pytest.raises(BadInput, match=r"q\.gguf: is already quantized .*--allow-requantize"):
        open_source(path)
    assert open_source(path, allow_requantize=True).is_quantized
    whole = write_model(tmp_path / "i.gguf", "llama", ONE, T.I32)
    assert not open_source(whole).is_quantized


@pytest.mark.parametrize(
    ("architecture", "kind", "tensors", "words"),
    [
        (None, None, ONE, "has no general.architecture"),
        ("hal9000", None, ONE, "unknown architecture 'hal9000'"),
        (None, "imatrix", ONE, "an importance matrix; give it with --imatrix"),
        ("llama", "adapter", ONE, "an adapter; merge it"),
        ("clip", None, ONE, "projector; give the language model"),
        ("clip", "mmproj", ONE, "projector; give the language model"),
        ("llama", None, {}, "only a vocabulary"),
    ],
)
def test_what_is_no_model_is_refused(
    tmp_path: Path,
    architecture: str | None,
    kind: str | None,
    tensors: Mapping[str, tuple[int, ...]],
    words: str,
) -> None:
    metadata = {} if kind is None else {"general__type": (kind, V.STRING)}
    path = write_model(tmp_path / "x.gguf", architecture, tensors, T.F16, **metadata)
    with pytest.raises(BadInput, match=words) as caught:
        open_source(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def write_splits(folder: Path, count: int = 3, n_tensors: int = 3) -> list[Path]:
    paths = []
    for number in range(count):
        paths.append(
            write_model(
                folder / f"m-{number + 1:05d}-of-{count:05d}.gguf",
                "llama" if number == 0 else None,
                {f"blk.{number}.attn_k.weight": (256, number + 1)},
                split__no=(number, V.UINT16),
                split__count=(count, V.UINT16),
                split__tensors__count=(n_tensors, V.INT32),
            )
        )
    return paths


def test_splits_are_one_source(tmp_path: Path) -> None:
    paths = write_splits(tmp_path)
    source = open_source(paths[0])
    assert [file.path for file in source.files] == paths
    assert list(source.tensors) == [f"blk.{n}.attn_k.weight" for n in range(3)]
    assert len(source.read("blk.2.attn_k.weight")) == 3 * 512
    assert source.n_bytes == sum(path.stat().st_size for path in paths)
    content = b"".join(path.read_bytes() for path in paths)
    assert source.sha256() == hashlib.sha256(content).hexdigest()
    assert source.header_sha256 != source.files[0].header_sha256
    assert make_groups(source)[0].layers == (0, 1, 2)


def refused(path: Path) -> str:
    with pytest.raises(BadInput) as caught:
        open_source(path)
    return str(caught.value)


def test_splits_that_are_not_all_there_are_refused_by_name(tmp_path: Path) -> None:
    paths = write_splits(tmp_path)
    assert "-00001-of-00003.gguf" in refused(paths[1])  # not the first
    content = paths[1].read_bytes()
    paths[1].unlink()
    assert "m-00002-of-00003.gguf: split 2 of 3 is missing" in refused(paths[0])
    paths[1].write_bytes(paths[2].read_bytes())
    assert "says it is split 3 of 3, not 2 of 3" in refused(paths[0])
    paths[1].write_bytes(content)
    renamed = paths[0].rename(tmp_path / "model.gguf")
    assert "rename the files" in refused(renamed)


def test_splits_that_hold_too_few_or_too_many_tensors_are_refused(tmp_path: Path) -> None:
    paths = write_splits(tmp_path, n_tensors=4)
    assert "hold 3 tensors of 4" in refused(paths[0])
    write_model(paths[1], None, ONE, T.F16, split__no=(1, V.UINT16), split__count=(3, V.UINT16))
    assert "has 'blk.0.attn_k.weight', which" in refused(paths[0])
    write_model(paths[0], "llama", ONE, split__count=("three", V.STRING))
    assert "split.count is no count" in refused(paths[0])


def test_sources_of_the_same_file_are_equal(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", "llama", ONE)
    first: Source = open_source(path)
    assert first == open_source(path)


# ---- artifacts ----


@pytest.fixture
def written(granite: Path, tmp_path: Path) -> Path:
    """A folder with the source.json and groups.json of the large hybrid."""
    source = open_source(granite)
    records = tuple(record_of(group) for group in make_groups(source))
    write_artifact(tmp_path / "source.json", source_file(source, "b" * 64, "a" * 64))
    write_artifact(tmp_path / "groups.json", Groups(groups=records))
    return tmp_path


def test_source_and_groups_are_read_back_as_written(written: Path, granite: Path) -> None:
    source = open_source(granite)
    found = read_artifact(written / "source.json", SourceFile, "run it again")
    assert found == source_file(source, "b" * 64, "a" * 64)
    assert found.path == granite.name and found.metadata["chat_template"] is False
    groups = read_artifact(written / "groups.json", Groups, "run it again").groups
    assert [group.name for group in groups] == [group.name for group in make_groups(source)]
    assert plain(groups) == described(granite)["groups"]


def spoil(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("source", lambda raw: [raw], r"source\.json: holds an array where an object was wanted; run it"),
        ("source", lambda raw: raw | {"format": 3}, r"has format 3, this version reads format 2"),
        ("source", lambda raw: {k: v for k, v in raw.items() if k != "format"}, "has no format number"),
        ("source", lambda raw: {k: v for k, v in raw.items() if k != "sha256"}, "has no key 'sha256'"),
        ("source", lambda raw: raw | {"layers": "40"}, "layers: wanted int, got str"),
        ("source", lambda raw: raw | {"metadata": []}, "metadata: wanted object, got array"),
        ("source", lambda raw: raw | {"sha265": ""}, "has the unknown key 'sha265'"),
        ("groups", lambda raw: raw["groups"], "holds an array where an object was wanted"),
        ("groups", lambda raw: raw | {"groups": raw["groups"][0]}, "groups: wanted array, got object"),
        (
            "groups",
            lambda raw: raw | {"groups": [raw["groups"][0] | {"protected": 0}]},
            r"groups\[0\]\.protected: wanted bool, got int",
        ),
    ],
)
def test_a_damaged_artifact_is_one_line(
    written: Path, name: str, change: Callable[[Any], Any], words: str
) -> None:
    path = written / f"{name}.json"
    wanted: type[SourceFile] | type[Groups] = SourceFile if name == "source" else Groups
    spoil(path, change)
    with pytest.raises(BadInput, match=words) as caught:
        read_artifact(path, wanted, "run it again")
    assert str(caught.value).startswith(str(path)) and str(caught.value).endswith("run it again")


def test_the_fingerprint_names_every_byte_whatever_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cerebellum.files._PIECE_BYTES", 1 << 10)
    content = bytes(range(256)) * 41
    one = tmp_path / "one"
    one.write_bytes(content)
    known = fingerprint_files([one])
    monkeypatch.setattr("cerebellum.files._MOST_HASHING", 1)
    assert fingerprint_files([one]) == known
    for at in (0, 1023, 1024, len(content) - 1):
        one.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert fingerprint_files([one]) != known
    parts = [tmp_path / "a", tmp_path / "b"]
    found = set()
    for cut in (1024, 2048, 5000):  # the same bytes in two files are another model
        parts[0].write_bytes(content[:cut])
        parts[1].write_bytes(content[cut:])
        found.add(fingerprint_files(parts))
    assert len(found) == 3 and known not in found
