"""Proves the finished file by reading it again: nothing is taken from the run's memory.

Types as planned, every untouched tensor bit-equal to the base, every demoted one bit-equal to the
shard that was measured, metadata copied, finite logits, and the perplexity of the file itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cerebellum.base import Base
from cerebellum.gguf import GgufFile, read_gguf
from cerebellum.measure.measurer import Measurer, file_variant
from cerebellum.shards import Shards, Variant, shard_tensors
from cerebellum.stats.paired import Perplexity, mean_interval, perplexity, without_nan


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at; ``detail`` says what was seen."""

    name: str
    ok: bool
    detail: str


def check_file(
    path: Path, plan: Mapping[str, Any], base: Base, shards: Shards, changes: Mapping[str, str]
) -> list[Check]:
    """Everything about the file that can be checked without running it."""
    file = read_gguf(path)
    return [
        _check_types(file, plan["tensor_types"]),
        _check_bytes(file, shards, changes),
        _check_metadata(file, base),
    ]


def _check_types(file: GgufFile, planned: Mapping[str, str]) -> Check:
    found = {tensor.name: tensor.type.name for tensor in file.tensors}
    wrong = sorted(n for n in planned.keys() | found.keys() if planned.get(n) != found.get(n))
    detail = f"{len(found)} tensors"
    if wrong:
        first = wrong[0]
        detail = f"{len(wrong)} differ, first {first}: planned {planned.get(first)}, found {found.get(first)}"
    return Check(name="types as planned", ok=not wrong, detail=detail)


def _check_bytes(file: GgufFile, shards: Shards, changes: Mapping[str, str]) -> Check:
    """The bytes of each tensor against the shard it must come from: base or demoted."""
    expected = {}
    for path in shards.variant(changes).paths:
        expected.update(shard_tensors(path))
    touched = {name for group in changes for name in shards.groups[group].tensors}
    wrong = [
        tensor.name
        for tensor in file.tensors
        if tensor.name not in expected or not np.array_equal(file.data(tensor), expected[tensor.name])
    ]
    untouched = len(file.tensors) - len(touched)
    detail = f"{untouched} bit-equal to the base, {len(touched)} to the measured demotion"
    if wrong:
        detail = f"{len(wrong)} differ, first {wrong[0]}"
    return Check(name="tensor bytes", ok=not wrong, detail=detail)


def _check_metadata(file: GgufFile, base: Base) -> Check:
    wanted = set(base.records)
    found = set(file.kv_records.values())
    file_type = file.value("general.file_type")
    version = file.value("general.quantization_version")
    ok = wanted == found and version is not None
    detail = f"{len(found)} keys copied as bytes, file type {file_type}, quantization version {version}"
    if not ok:
        detail = f"{len(wanted ^ found)} records differ from the base's"
    return Check(name="metadata", ok=ok, detail=detail)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Perplexity of source, base and finished file on the report text, and the paired change."""

    text: str
    text_sha256: str
    same_as_selection: bool
    chunks: int
    of_chunks: int
    source: Perplexity
    base: Perplexity
    result: Perplexity
    delta_pct: float
    ci_pct: tuple[float, float]


def report(
    measurer: Measurer, source: Variant, base: Variant, result: Path, chunks: int, selection: str
) -> Report:
    """Measures the three on the first ``chunks`` chunks, as llama-perplexity would count them."""
    corpus = measurer.corpus
    wanted = range(min(chunks, corpus.n_chunks))
    nll = [measurer.nll(variant, wanted) for variant in (source, base, file_variant(result, "finished file"))]
    delta = mean_interval((nll[2] - nll[1]).mean(axis=1, dtype=np.float64), population=10**9)
    mean, low, high = delta.percent()
    found = [perplexity(vector) for vector in nll]
    return Report(
        text=corpus.path.name,
        text_sha256=corpus.sha256,
        same_as_selection=corpus.sha256 == selection,
        chunks=len(wanted),
        of_chunks=corpus.n_chunks,
        source=found[0],
        base=found[1],
        result=found[2],
        delta_pct=mean,
        ci_pct=(low, high),
    )


def verify_json(checks: Sequence[Check], found: Report) -> dict[str, Any]:
    """verify.json; a perplexity that is not finite is null there, and a failed check."""
    finite = Check(
        name="finite logits",
        ok=bool(np.isfinite([found.result.ppl, found.delta_pct]).all()),
        detail=f"{found.result.tokens} tokens scored",
    )
    everything = [*checks, finite]
    return {
        "ok": all(check.ok for check in everything),
        "checks": [asdict(check) for check in everything],
        "report": without_nan(asdict(found)),
    }
