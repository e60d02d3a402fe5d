"""Groups the source's tensors: which are measured together, which never, and what each may become.

A group is one role over all layers, or over a span of them. What a tensor is follows from its GGUF name
alone, as in llama.cpp's own quantizer, so that any architecture it knows is grouped without a table of ours.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from cerebellum.codec import Artifact, Record
from cerebellum.errors import BadInput
from cerebellum.gguf import TensorInfo, legal_types
from cerebellum.settings import Allocated
from cerebellum.source import Scalar, Source, plain_metadata
from cerebellum.source.origin import Origin, origin_of

BLOCK = re.compile(r"^(?P<prefix>(?:\w+\.)*?)blk\.(?P<layer>\d+)\.(?P<rest>.+)$", re.ASCII)

EMBEDDINGS_AND_HEADS = frozenset({"output", "cls", "cls.output", "token_types"})
PER_LAYER_EMBEDDING_ROLES = frozenset({"inp_gate", "proj", "post_norm"})
"""Gemma 3n's per-layer-embedding tensors inside the blocks; outside: `per_layer_`."""

PROTECTED_ROLES = frozenset({"ssm_a", "ssm_d", "ssm_dt"})

PROTECTED_PARTS = (
    "ffn_gate_inp",
    "norm",
    "token_embd",
    "position_embd",
    "embed_tokens",
    "shared_head_head",
    "ssm_conv1d",
    "per_layer_",
)
"""Parts of a role that are never touched: routers, norms, embeddings and heads
(those of multi-token prediction too), the convolution, per-layer embeddings."""

LLAMA_CPP_NEVER_QUANTIZES = (
    "ffn_gate_tid2eid.weight",
    "altup",
    "laurel",
    "shortconv.conv.weight",
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
    "time_mix_first.weight",
    "time_mix_w0.weight",
    "time_mix_w1.weight",
    "time_mix_w2.weight",
    "time_mix_v0.weight",
    "time_mix_v1.weight",
    "time_mix_v2.weight",
    "time_mix_a0.weight",
    "time_mix_a1.weight",
    "time_mix_a2.weight",
    "time_mix_g1.weight",
    "time_mix_g2.weight",
    "time_mix_decay_w1.weight",
    "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight",
    "attn_rel_b.weight",
    ".position_embd",
    "sam.pos_embd",
    "sam.neck.",
    "sam.net_",
    ".rel_pos",
    ".patch_embd",
    ".patch_merger",
    "a.rvq.codebook",
    "mm.a.code_embd",
)
"""llama-quant.cpp, tensor_allows_quantization: parts of names it leaves alone, beyond the above."""

GLM5_NEXT_NEVER_QUANTIZES = (
    "hc_",
    "indexer.attn_q_b",
    "indexer.attn_k",
    "indexer.proj",
    "indexer_compressor_gate",
    "indexer_compressor_ape",
    "ssm_f_a.weight",
    "ssm_f_b.weight",
    "ssm_g_a.weight",
    "ssm_g_b.weight",
    "ssm_beta.weight",
    "attn_kv_a_mqa.weight",
    "attn_k_b.weight",
    "attn_v_b.weight",
)
"""The same function's list for one architecture; others have such names and quantize them."""

ROUTED = re.compile(r"_(?:ch)?exps(?:\.\w+)?$")
"""Roles of routed experts: `_exps`, and GroveMoE's shared-between-neighbours `_chexps`, with biases
and scales. The last dimension counts the experts."""

HEAD_ROLE = "output"
EMBEDDING_ROLE = "token_embd"

MTP_PREFIX = "mtp:"
"""Stands before the roles of layers for multi-token prediction: they are groups of their own."""

ATTENTION_ROLES = frozenset({"attn_k", "attn_kv_a_mqa", "attn_kv_b", "attn_k_b"})
RECURRENT_PREFIXES = ("ssm_", "time_mix_", "shortconv.")


@dataclass(frozen=True, kw_only=True)
class Group:
    """Holds tensors that are measured together and get one type; a protected group has no `legal_types`.

    ``layers`` count from 0, ``n_bytes`` is the size in the source, and ``types`` counts the tensors of each
    type.
    """

    name: str
    role: str
    layers: tuple[int, ...]
    tensors: tuple[str, ...]
    parameters: int
    n_bytes: int
    types: dict[str, int]
    protected: bool
    legal_types: tuple[str, ...]


class GroupRecord(Record, frozen=True, kw_only=True):
    """Describes a group in `inspect --json` and in groups.json; other programs rely on its keys.

    ``tensors`` is their number and ``tensor_names`` their names; ``layers`` count from 0; ``bytes`` is the
    size in the source; ``types`` maps a type of the source to the number of tensors that have it.
    """

    name: str
    role: str
    layers: tuple[int, ...]
    tensors: int
    tensor_names: tuple[str, ...]
    parameters: int
    bytes: int
    types: dict[str, int]
    protected: bool
    legal_types: tuple[str, ...]


class ModelFacts(Record, frozen=True, kw_only=True):
    """Describes a model without its groups; other programs rely on its keys.

    ``active_parameters`` are those that one token meets, ``experts_used`` the experts that it is sent to,
    ``attention_layers`` layer numbers from 0, ``recurrent_layers`` the number of layers with a state,
    ``context_length`` is in tokens. A count that the file does not give is 0.
    """

    architecture: str
    name: str
    parameters: int
    active_parameters: int
    layers: int
    experts: int
    experts_used: int
    attention_layers: tuple[int, ...]
    recurrent_layers: int
    context_length: int
    bytes: int


class Description(ModelFacts, frozen=True, kw_only=True):
    """Holds what `inspect --json` prints: the model, then its groups, the demotable ones first."""

    groups: tuple[GroupRecord, ...]


class Groups(Artifact, frozen=True, kw_only=True):
    """Holds groups.json: the groups that the measurements and the plan of a run folder name."""

    format: Literal[1] = 1
    groups: tuple[GroupRecord, ...]


class SourceFile(ModelFacts, Artifact, frozen=True, kw_only=True):
    """Holds source.json: what the source of a run is, by content and header, and the facts of its header.

    ``path`` is the file's name without its folder, because an artifact does not say where things lie.
    ``requantized`` says that the source was quantized already, which the card tells its readers. ``origin`` is
    what it was converted from, where that was done here. ``fingerprint`` names its content as well as ``sha256``,
    which is None until a run has read all of it.
    """

    format: Literal[2] = 2
    path: str
    sha256: str | None
    fingerprint: str
    header_sha256: str
    requantized: bool
    metadata: dict[str, Scalar | list[Scalar]]
    origin: Origin | None = None


def role_of(tensor_name: str) -> str:
    """Returns what a tensor does: its name without `blk.N.` and `.weight`.

    `blk.3.attn_q.weight` -> `attn_q`, `enc.blk.3.attn_q.weight` -> `enc.attn_q`,
    `blk.3.ssm_dt.bias` -> `ssm_dt.bias`, `token_embd.weight` -> `token_embd`.
    """
    match = BLOCK.match(tensor_name)
    name = tensor_name if match is None else match["prefix"] + match["rest"]
    return name.removesuffix(".weight")


def layer_of(tensor_name: str) -> int | None:
    """Returns the layer that a tensor belongs to, counted from 0, or None for one outside the layers."""
    match = BLOCK.match(tensor_name)
    return None if match is None else int(match["layer"])


def is_protected(name: str, shape: Sequence[int], architecture: str = "") -> bool:
    """Says whether a tensor is never touched: those of the lists above, and what llama-quantize leaves alone.

    A tensor is 1-D when ggml counts it so: trailing dimensions of one do not count.
    """
    role = role_of(name)
    if not name.endswith("weight") or all(n == 1 for n in shape[1:]):
        return True
    own = role.rpartition(".")[2] if layer_of(name) is not None else role
    if role in EMBEDDINGS_AND_HEADS or own in PROTECTED_ROLES or own in PER_LAYER_EMBEDDING_ROLES:
        return True
    if architecture == "glm5-next" and any(part in name for part in GLM5_NEXT_NEVER_QUANTIZES):
        return True
    return any(part in role for part in PROTECTED_PARTS) or any(
        part in name for part in LLAMA_CPP_NEVER_QUANTIZES
    )


_LEFT_ALONE = (
    "norm",
    "ffn_gate_inp.weight",
    "ssm_conv1d",
    "position_embd",
    "token_types.",
    "per_layer_model_proj",
)


def llama_leaves_alone(name: str, architecture: str) -> bool:
    """Says whether llama-quantize keeps a weight as it is even where a --tensor-type-file names it."""
    parts: tuple[str, ...] = (*_LEFT_ALONE, *LLAMA_CPP_NEVER_QUANTIZES)
    parts += GLM5_NEXT_NEVER_QUANTIZES if architecture == "glm5-next" else ()
    return any(part in name for part in parts)


def make_groups(
    source: Source, has_imatrix: bool = True, spans: int = 1, allocate: Sequence[Allocated] = ()
) -> tuple[Group, ...]:
    """Returns the source's groups: first the demotable ones, then the protected ones.

    Each part is in the order in which the roles first appear in the file. With ``spans`` over 1, a role that
    may be demoted is cut into as many groups of neighbouring layers at most. Without an importance matrix,
    the types that llama.cpp makes with one only are not legal. Embeddings and output head are protected but for
    what ``allocate`` names. Layers for predicting further tokens (MTP) are groups of their own and protected: no
    ordinary run reads them, so that any change of theirs would seem to do no damage.
    """
    by_role: dict[str, list[TensorInfo]] = {}
    mtp = set(mtp_layers(source))
    for tensor in source.tensors.values():
        prefix = MTP_PREFIX if layer_of(tensor.name) in mtp or ".nextn." in tensor.name else ""
        by_role.setdefault(prefix + role_of(tensor.name), []).append(tensor)
    free = allocated_roles(source, allocate)
    groups: list[Group] = []
    for role, tensors in by_role.items():
        whole = _make_group(role, tensors, source.architecture, has_imatrix, role in free)
        groups += [whole] if whole.protected else _cut(whole, tensors, spans)
    return tuple(sorted(groups, key=lambda group: group.protected))


def mtp_layers(source: Source) -> tuple[int, ...]:
    """Returns the layers for multi-token prediction, counted from 0: the last ones, as many as the metadata says.

    A layer with a tensor named ``nextn`` is one too, whatever the metadata says.
    """
    count = _count(source, "block_count")
    n_mtp = min(_count(source, "nextn_predict_layers"), count)
    named = {layer for name in source.tensors if ".nextn." in name and (layer := layer_of(name)) is not None}
    return tuple(sorted(named.union(range(count - n_mtp, count))))


def is_tied(source: Source) -> bool:
    """Says whether the embeddings are the output head too, one tensor for both."""
    return HEAD_ROLE not in map(role_of, source.tensors)


def allocated_roles(source: Source, allocate: Sequence[Allocated]) -> frozenset[str]:
    """Returns the roles that ``allocate`` frees; where embeddings and head are tied, either word means both."""
    head = EMBEDDING_ROLE if is_tied(source) else HEAD_ROLE
    roles: dict[Allocated, str] = {"head": head, "embd": EMBEDDING_ROLE}
    return frozenset(roles[word] for word in allocate)


def _cut(whole: Group, tensors: list[TensorInfo], spans: int) -> list[Group]:
    """Cuts a group into ``spans`` spans of layers, as even as can be, or leaves a small one whole."""
    n = min(spans, len(whole.layers))
    if n < 2 or any(layer_of(t.name) is None for t in tensors):
        return [whole]
    cut = [part.tolist() for part in np.array_split(np.array(whole.layers), n)]
    return [_part(whole, [t for t in tensors if layer_of(t.name) in layers], layers) for layers in cut]


def _part(whole: Group, tensors: list[TensorInfo], layers: list[int]) -> Group:
    return replace(
        whole,
        name=span_name(whole.role, layers),
        layers=tuple(layers),
        tensors=tuple(t.name for t in tensors),
        parameters=sum(t.n_elements for t in tensors),
        n_bytes=sum(t.n_bytes for t in tensors),
        types=dict(Counter(t.type.name for t in tensors)),
    )


def given_groups(source: Source, types: Mapping[str, str]) -> tuple[Group, ...]:
    """Returns the source's groups where types are given by tensor: those of a role that are to have one type.

    A tensor that is named is free to be changed, whatever it does; what is not named is left as it is, in a group of
    its own where others of its role are named.
    """
    parts: dict[tuple[str, str | None], list[TensorInfo]] = {}
    for tensor in source.tensors.values():
        parts.setdefault((role_of(tensor.name), types.get(tensor.name)), []).append(tensor)
    roles = Counter(role for role, _ in parts)
    groups = [
        replace(
            _make_group(role, tensors, source.architecture, has_imatrix=True, allocated=False),
            name=role if roles[role] == 1 else f"{role}.{qtype or 'rest'}",
            protected=qtype is None,
            legal_types=() if qtype is None else (qtype,),
        )
        for (role, qtype), tensors in parts.items()
    ]
    twice = next((name for name, n in Counter(group.name for group in groups).items() if n > 1), None)
    if twice is not None:
        raise BadInput(
            f"{source.path}: two groups of its tensors would be called {twice!a}; rename its tensors"
        )
    return tuple(sorted(groups, key=lambda group: group.protected))


def span_name(role: str, layers: Sequence[int]) -> str:
    """Returns the name of a span: ``ffn_down_exps.0-4`` or, of one layer, ``ffn_down_exps.3``."""
    return f"{role}.{layers[0]}" + (f"-{layers[-1]}" if len(layers) > 1 else "")


def _make_group(
    role: str, tensors: list[TensorInfo], architecture: str, has_imatrix: bool, allocated: bool
) -> Group:
    """Makes the group of one role; one protected tensor protects its whole role.

    What was ``allocated`` has no entry in an importance matrix, and so no type that needs one.
    """
    protected = role.startswith(MTP_PREFIX) or any(
        is_protected(t.name, t.shape, architecture) for t in tensors
    )
    protected = protected and not allocated
    shapes = [t.shape for t in tensors]
    legal = () if protected else legal_types(shapes, has_imatrix and not allocated)
    layers = {layer for t in tensors if (layer := layer_of(t.name)) is not None}
    return Group(
        name=role,
        role=role,
        layers=tuple(sorted(layers)),
        tensors=tuple(t.name for t in tensors),
        parameters=sum(t.n_elements for t in tensors),
        n_bytes=sum(t.n_bytes for t in tensors),
        types=dict(Counter(t.type.name for t in tensors)),
        protected=protected,
        legal_types=tuple(type_.name for type_ in legal),
    )


def describe(source: Source, groups: Sequence[Group]) -> Description:
    """Returns what `inspect --json` prints about a model and its groups."""
    facts = _facts(source)
    return Description(
        **{name: getattr(facts, name) for name in facts.__struct_fields__},
        groups=tuple(record_of(group) for group in groups),
    )


def source_file(source: Source, fingerprint: str, sha256: str | None) -> SourceFile:
    """Returns what source.json says of a model whose content has this fingerprint and, once known, this SHA-256."""
    facts = _facts(source)
    return SourceFile(
        **{name: getattr(facts, name) for name in facts.__struct_fields__},
        path=source.path.name,
        sha256=sha256,
        fingerprint=fingerprint,
        header_sha256=source.header_sha256,
        requantized=source.is_quantized,
        metadata=dict(plain_metadata(source.files[0])),
        origin=origin_of(source.path, source.header_sha256),
    )


def record_of(group: Group) -> GroupRecord:
    """Returns a group as `inspect --json` and groups.json show it."""
    return GroupRecord(
        name=group.name,
        role=group.role,
        layers=group.layers,
        tensors=len(group.tensors),
        tensor_names=group.tensors,
        parameters=group.parameters,
        bytes=group.n_bytes,
        types=dict(group.types),
        protected=group.protected,
        legal_types=group.legal_types,
    )


def _facts(source: Source) -> ModelFacts:
    return ModelFacts(
        architecture=source.architecture,
        name=source.name,
        parameters=sum(t.n_elements for t in source.tensors.values()),
        active_parameters=active_parameters(source),
        layers=_count(source, "block_count"),
        experts=_count(source, "expert_count"),
        experts_used=_count(source, "expert_used_count"),
        attention_layers=attention_layers(source),
        recurrent_layers=len(recurrent_layers(source)),
        context_length=_count(source, "context_length"),
        bytes=source.n_bytes,
    )


def active_parameters(source: Source) -> int:
    """Returns the parameters that one token meets: all of them, but of routed experts only those used.

    Of a tensor of E experts, `expert_used_count` / E counts; without that key all of it does.
    """
    n_used = _count(source, "expert_used_count")
    total = 0
    for tensor in source.tensors.values():
        n_experts = tensor.shape[-1]
        routed = ROUTED.search(role_of(tensor.name)) and "norm" not in tensor.name
        if routed and 0 < n_used < n_experts:
            total += tensor.n_elements * n_used // n_experts
        else:
            total += tensor.n_elements
    return total


def attention_layers(source: Source) -> tuple[int, ...]:
    """Returns the layers that attend, counted from 0.

    A layer attends if it has keys of its own, or a fused `attn_qkv` that no recurrent mixer uses (as the
    linear attention of Qwen3-Next and RWKV hybrids does). Where `head_count_kv` is given per layer, zero
    rules a layer out: Kimi Linear's recurrent layers have an `attn_k` too.
    """
    heads = source.arch_value("attention.head_count_kv")
    without_keys: set[int] = set()
    if isinstance(heads, np.ndarray):
        without_keys = {layer for layer, n_heads in enumerate(heads) if n_heads == 0}
    return tuple(
        layer
        for layer, roles in sorted(_roles_by_layer(source).items())
        if layer not in without_keys
        and (roles & ATTENTION_ROLES or ("attn_qkv" in roles and not _any_recurrent(roles)))
    )


def recurrent_layers(source: Source) -> tuple[int, ...]:
    """Returns the layers with a state, counted from 0: state-space, RWKV, short convolution."""
    return tuple(layer for layer, roles in sorted(_roles_by_layer(source).items()) if _any_recurrent(roles))


def _roles_by_layer(source: Source) -> dict[int, set[str]]:
    """Returns the roles of each layer, those of an encoder and a decoder (T5) without their prefix."""
    roles: dict[int, set[str]] = {}
    for name in source.tensors:
        layer = layer_of(name)
        if layer is not None:
            role = role_of(name).removeprefix("enc.").removeprefix("dec.")
            roles.setdefault(layer, set()).add(role)
    return roles


def _any_recurrent(roles: set[str]) -> bool:
    return any(role.startswith(RECURRENT_PREFIXES) for role in roles)


def _count(source: Source, suffix: str) -> int:
    """Returns a metadata count, 0 where it is not given; of a count for each layer, the largest."""
    value = source.arch_value(suffix, 0)
    if isinstance(value, np.ndarray):
        return int(value.max()) if value.size and value.dtype.kind in "iu" else 0
    return int(value) if isinstance(value, int) else 0
