"""Proves the finished file by reading it again: nothing is taken from the run's memory.

Types as planned, every untouched tensor bit-equal to the base, every demoted one bit-equal to the
shard that was measured, metadata copied, finite logits, and the perplexity of the file itself.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from cerebellum.codec import Artifact, Record
from cerebellum.gguf import row_bytes
from cerebellum.plan.artifacts import Plan
from cerebellum.source import TEMPLATE_KEY, Source, open_source
from cerebellum.stats.paired import Perplexity, perplexity, superpopulation_interval
from cerebellum.verdicts import Changes

if TYPE_CHECKING:  # whoever only reads verify.json needs none of these
    from cerebellum.base import Base
    from cerebellum.layout import Layout
    from cerebellum.measure.measurer import Measurer
    from cerebellum.shards import Shards, Variant


TEMPLATE_CHECK = "chat template"
"""The check that says whether the chat template is the source's, with its hash."""

_SAMPLE_SEED = 20
_SAMPLED_TENSORS = 24
_SAMPLED_ROWS = 16  # of each, all of one expert


class Check(Record, frozen=True, kw_only=True):
    """One thing that was looked at; ``detail`` says what was seen."""

    name: str
    ok: bool
    detail: str


class Measured(Record, frozen=True, kw_only=True):
    """Perplexity over ``tokens`` scored tokens and its standard error; None where it is not finite."""

    ppl: float | None
    se: float | None
    tokens: int

    @classmethod
    def of(cls, found: Perplexity) -> Measured:
        """Keeps what JSON has a number for."""
        return cls(ppl=_finite(found.ppl), se=_finite(found.se), tokens=found.tokens)


class Report(Record, frozen=True, kw_only=True):
    """Perplexity of source, base and finished file on the report text, and the paired change in percent."""

    text: str
    text_sha256: str
    same_as_selection: bool
    chunks: int
    of_chunks: int
    source: Measured
    base: Measured
    result: Measured
    delta_pct: float | None
    ci_pct: tuple[float | None, float | None]


class Verified(Artifact, frozen=True, kw_only=True):
    """verify.json: every check, and what the report text says."""

    format: Literal[1] = 1
    ok: bool
    checks: tuple[Check, ...]
    report: Report


def check_file(path: Path, plan: Plan, source: Source, layout: Layout, shards: Shards) -> list[Check]:
    """Checks everything about the file, or all of its splits, that can be checked without running it."""
    file = open_source(path, allow_requantize=True)
    return [
        _check_types(file, plan.tensor_types),
        _check_bytes(file, shards, plan.changes, layout),
        _check_sample(file, shards, layout),
        _check_metadata(file, layout.base),
        *_check_template(file, source, layout.base),
    ]


def _check_types(file: Source, planned: Mapping[str, str]) -> Check:
    found = {name: tensor.type.name for name, tensor in file.tensors.items()}
    wrong = sorted(n for n in planned.keys() | found.keys() if planned.get(n) != found.get(n))
    detail = f"{len(found)} tensors"
    if wrong:
        first = wrong[0]
        detail = f"{len(wrong)} differ, first {first}: planned {planned.get(first)}, found {found.get(first)}"
    return Check(name="types as planned", ok=not wrong, detail=detail)


def _check_bytes(file: Source, shards: Shards, changes: Changes, layout: Layout) -> Check:
    """Compares the bytes of each tensor with the shard that it must come from: base or changed."""
    from cerebellum.shards import shard_tensors

    expected = {}
    for path in shards.checked(changes).paths:
        expected.update(shard_tensors(path))
    touched = {name for group in changes for name in layout.groups[group].tensors}
    wrong = [
        name
        for name in file.tensors
        if name not in expected or not np.array_equal(file.read(name), expected[name])
    ]
    untouched = len(file.tensors) - len(touched)
    detail = f"{untouched} bit-equal to the base, {len(touched)} to the measured demotion"
    if wrong:
        detail = f"{len(wrong)} differ, first {wrong[0]}"
    return Check(name="tensor bytes", ok=not wrong, detail=detail)


def _check_sample(file: Source, shards: Shards, layout: Layout) -> Check:
    """Quantizes a seeded sample of rows again, from the source, and compares them with the file's.

    No shard has a part in this reference, so damage that the shards share with the file is seen here.
    """
    rng = np.random.default_rng(_SAMPLE_SEED)
    named = file.tensors
    grouped = [name for group in layout.groups.values() for name in group.tensors if name in named]
    chosen = rng.choice(grouped, min(_SAMPLED_TENSORS, len(grouped)), replace=False) if grouped else ()
    wrong = []
    n_rows = 0
    for name in map(str, chosen):
        tensor = named[name]
        first = int(rng.integers(math.prod(tensor.shape[1:]) // _SAMPLED_ROWS or 1)) * _SAMPLED_ROWS
        last = min(first + _SAMPLED_ROWS, (first // tensor.shape[1] + 1) * tensor.shape[1])
        size = row_bytes(tensor.type, tensor.shape[0])
        found = file.read(name)[first * size : last * size]
        n_rows += last - first
        if not np.array_equal(found, shards.rows(name, tensor.type, range(first, last))):
            wrong.append(name)
    detail = f"{n_rows} rows of {len(chosen)} tensors, quantized again from the source, are the file's"
    if wrong:
        detail = f"rows of {len(wrong)} tensors are not what the source gives, first {wrong[0]}"
    return Check(name="sample made again", ok=not wrong, detail=detail)


def _check_metadata(file: Source, base: Base) -> Check:
    wanted = set(base.records)
    found = {record for key, record in file.kv_records.items() if not key.startswith("split.")}
    file_type = file.value("general.file_type")
    version = file.value("general.quantization_version")
    ok = wanted == found and version is not None
    detail = f"{len(found)} keys copied as bytes, file type {file_type}, quantization version {version}"
    if len(file.files) > 1:
        detail += f", {len(file.files)} splits"
    if not ok:
        detail = f"{len(wanted ^ found)} records differ from the base's"
    return Check(name="metadata", ok=ok, detail=detail)


def _check_template(file: Source, source: Source, base: Base) -> list[Check]:
    """Compares the chat template with the source's, byte by byte; a model that has none needs no check.

    A base that was given may have another template, mended by its maker, and that one is then wanted.
    """
    given = base.file is not None
    wanted = (base.file or source).kv_records.get(TEMPLATE_KEY)
    found = file.kv_records.get(TEMPLATE_KEY)
    if wanted is None and found is None:
        return []
    text = file.value(TEMPLATE_KEY)
    digest = hashlib.sha256(str(text).encode()).hexdigest() if text is not None else "none"
    whose = "the base file's" if given and wanted != source.kv_records.get(TEMPLATE_KEY) else "the source's"
    ok = wanted == found
    detail = f"copied unchanged, {whose}, sha256 {digest}" if ok else f"is not {whose}; sha256 {digest}"
    return [Check(name=TEMPLATE_CHECK, ok=ok, detail=detail)]


def report(
    measurer: Measurer, source: Variant, base: Variant, result: Path, chunks: int, selection: str
) -> Report:
    """Measures the three on the first ``chunks`` chunks, as llama-perplexity would count them.

    The interval is for text like those chunks: it speaks for the articles further on only as far as they are alike.
    """
    from cerebellum.measure.crew import Wish
    from cerebellum.measure.measurer import file_variant

    corpus = measurer.corpus
    wanted = range(min(chunks, corpus.n_chunks))
    variants = (source, base, file_variant(result, "finished file"))
    measurer.want(0, [Wish(nll=tuple(wanted), variant=variant) for variant in variants], ())
    nll = [measurer.nll(variant, wanted) for variant in variants]
    delta = superpopulation_interval((nll[2] - nll[1]).mean(axis=1, dtype=np.float64))
    mean, low, high = delta.percent()
    found = [Measured.of(perplexity(vector)) for vector in nll]
    return Report(
        text=corpus.path.name,
        text_sha256=corpus.sha256,
        same_as_selection=corpus.sha256 == selection,
        chunks=len(wanted),
        of_chunks=corpus.n_chunks,
        source=found[0],
        base=found[1],
        result=found[2],
        delta_pct=_finite(mean),
        ci_pct=(_finite(low), _finite(high)),
    )


def verified(checks: Sequence[Check], found: Report) -> Verified:
    """Returns verify.json; a perplexity that is not finite is a failed check."""
    finite = Check(
        name="finite logits",
        ok=found.result.ppl is not None and found.delta_pct is not None,
        detail=f"{found.result.tokens} tokens scored",
    )
    everything = (*checks, finite)
    return Verified(ok=all(check.ok for check in everything), checks=everything, report=found)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
