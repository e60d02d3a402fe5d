"""Proves the finished file by reading it again: nothing is taken from the run's memory.

Types as planned, every untouched tensor bit-equal to the base, every demoted one bit-equal to the
shard that was measured, metadata copied, finite logits, and the perplexity of the file itself.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from cerebellum.codec import Artifact, Record
from cerebellum.engine.speed import Speeds
from cerebellum.gguf import row_bytes
from cerebellum.plan.artifacts import Plan
from cerebellum.source import TEMPLATE_KEY, Source, open_source
from cerebellum.stats.paired import Interval, Perplexity, perplexity, superpopulation_interval
from cerebellum.verdicts import Changes

if TYPE_CHECKING:  # whoever only reads verify.json needs none of these
    from cerebellum.base import Base
    from cerebellum.layout import Layout
    from cerebellum.measure.measurer import Measurer
    from cerebellum.shards import Shards, Variant
    from cerebellum.texts import Corpus, Part


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


class Divergence(Record, frozen=True, kw_only=True):
    """KL divergence from the source's predictions on ``chunks`` chunks, nats a token, with 95% intervals.

    ``change`` is the finished file's against the base's on the same chunks: below zero it is nearer to the source.
    """

    chunks: int
    base: float | None
    base_ci: tuple[float | None, float | None]
    result: float | None
    result_ci: tuple[float | None, float | None]
    change: float | None
    change_ci: tuple[float | None, float | None]


class Confidence(Record, frozen=True, kw_only=True):
    """How sure of itself the source is on the report text: its loss and the entropy of its predictions, nats a token.

    ``gap`` is loss less entropy, paired by chunk, with its 95% interval: above zero the source is overconfident there,
    below zero underconfident. ``loss_change`` is what the finished file adds to the loss of the source.
    """

    loss: float
    entropy: float
    gap: float
    gap_ci: tuple[float | None, float | None]
    loss_change: float

    @property
    def matters(self) -> bool:
        """Says whether perplexity alone misjudges the file: the gap surely is one, and as large as the change of loss.

        Rounding makes predictions flatter. That by itself raises the loss of a model that is as sure as it should be,
        and lowers that of an overconfident one, by an amount that grows with the gap.
        """
        low, high = self.gap_ci
        if low is None or high is None or low <= 0 <= high:
            return False
        return abs(self.gap) >= abs(self.loss_change)


class DomainReport(Record, frozen=True, kw_only=True):
    """What the report text says of one of its domains: ``delta_pct`` is the paired change of perplexity."""

    name: str
    text: str
    chunks: int
    of_chunks: int
    source: Measured
    base: Measured
    result: Measured
    delta_pct: float | None
    ci_pct: tuple[float | None, float | None]
    divergence: Divergence | None


class Report(Record, frozen=True, kw_only=True):
    """Perplexity of source, base and finished file on the report text, and the paired change in percent.

    ``seed`` drew ``chunks`` of the text's ``of_chunks`` at random; it is None where all were read. A report text of
    several domains has them in ``domains`` too; its own figures are then of all their chunks.
    """

    text: str
    text_sha256: str
    same_as_selection: bool
    chunks: int
    of_chunks: int
    seed: int | None
    source: Measured
    base: Measured
    result: Measured
    delta_pct: float | None
    ci_pct: tuple[float | None, float | None]
    domains: tuple[DomainReport, ...] = ()
    confidence: Confidence | None = None


class Verified(Artifact, frozen=True, kw_only=True):
    """verify.json: every check, what the report text says, and the speed where it was asked for.

    Format 1 read the first chunks of a report text where not all of them were asked for; 2 draws them at random.
    """

    format: Literal[2] = 2
    ok: bool
    checks: tuple[Check, ...]
    report: Report
    speeds: Speeds | None = None


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


@dataclass(frozen=True, kw_only=True)
class _Vectors:
    """What was measured on the report text: ``nll`` of source, base and finished file on ``chunks``, nats, each
    (chunks, scored tokens); ``entropy_N`` of the source's predictions, a mean for each of ``chunks``, nats a token;
    ``kld`` of base and finished file, a mean for each chunk that was compared.
    """

    chunks: tuple[int, ...]
    nll: tuple[NDArray[np.float32], ...]
    entropy_N: NDArray[np.float64]
    kld: Mapping[int, tuple[float, float]]

    def rows(self, part: range) -> list[int]:
        """Returns the places of a domain's chunks among those that were measured."""
        return [place for place, chunk in enumerate(self.chunks) if chunk in part]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """How many chunks of the report text to read (0: all), the seed that draws them, and hashes of what has decided."""

    chunks: int
    seed: int
    selection: frozenset[str]

    def of(self, corpus: Corpus) -> tuple[int, ...]:
        """Returns the chunks to read, in the order drawn."""
        return corpus.sample(self.chunks or corpus.n_chunks, self.seed)


def report(measurer: Measurer, source: Variant, base: Variant, result: Path, asked: Asked) -> Report:
    """Measures the three on the chunks that were asked for, and returns what the report text says.

    Where the measurer keeps the source's predictions, divergences from it are measured too. The source must be one of
    those whose entropy the measurer measures. The interval is for text like this one, of which the chunks that were
    drawn are a random part.
    """
    corpus = measurer.corpus
    wanted = tuple(sorted(asked.of(corpus)))
    found = _measure(measurer, source, base, result, wanted)
    mean, bounds = _change(found.nll, list(range(len(wanted))))
    told = [Measured.of(perplexity(vector)) for vector in found.nll]
    return Report(
        text=corpus.name,
        text_sha256=corpus.sha256,
        same_as_selection=bool(corpus.texts & asked.selection),
        chunks=len(wanted),
        of_chunks=corpus.n_chunks,
        seed=asked.seed if len(wanted) < corpus.n_chunks else None,
        source=told[0],
        base=told[1],
        result=told[2],
        delta_pct=mean,
        ci_pct=bounds,
        domains=tuple(_domain(part, found) for part in corpus.parts if found.rows(part.chunks)),
        confidence=_confidence(found),
    )


def _measure(
    measurer: Measurer, source: Variant, base: Variant, result: Path, chunks: tuple[int, ...]
) -> _Vectors:
    """Measures all three; the source first, for its predictions are kept while it is scored."""
    from cerebellum.measure.crew import Wish
    from cerebellum.measure.measurer import file_variant

    finished = file_variant(result, "finished file")
    compared = [chunk for chunk in chunks if measurer.cache is not None and chunk in measurer.cache.chunks]
    measurer.want(0, [Wish(nll=chunks, variant=source)], ())
    of_source = measurer.nll(source, chunks)
    wishes = [Wish(nll=chunks, kld=tuple(compared), variant=variant) for variant in (base, finished)]
    measurer.want(0, wishes, ())
    klds = [measurer.kld_means(variant, compared) for variant in (base, finished)] if compared else []
    pairs = zip(*klds, strict=True) if klds else ()
    return _Vectors(
        chunks=chunks,
        nll=(of_source, measurer.nll(base, chunks), measurer.nll(finished, chunks)),
        entropy_N=measurer.entropy_means(source, chunks),
        kld={chunk: (float(b), float(r)) for chunk, (b, r) in zip(compared, pairs, strict=False)},
    )


def _confidence(found: _Vectors) -> Confidence | None:
    """Returns the source's loss beside the entropy of its predictions; None where one of them is not finite."""
    loss_N = found.nll[0].mean(axis=1, dtype=np.float64)
    added = float((found.nll[2].mean(axis=1, dtype=np.float64) - loss_N).mean())
    gap = superpopulation_interval(loss_N - found.entropy_N)
    if not (math.isfinite(gap.mean) and math.isfinite(added)):
        return None
    return Confidence(
        loss=float(loss_N.mean()),
        entropy=float(found.entropy_N.mean()),
        gap=gap.mean,
        gap_ci=_bounds(gap),
        loss_change=added,
    )


def _domain(part: Part, found: _Vectors) -> DomainReport:
    rows = found.rows(part.chunks)
    mean, bounds = _change(found.nll, rows)
    told = [Measured.of(perplexity(vector[rows])) for vector in found.nll]
    return DomainReport(
        name=part.domain,
        text=part.path.name,
        chunks=len(rows),
        of_chunks=len(part.chunks),
        source=told[0],
        base=told[1],
        result=told[2],
        delta_pct=mean,
        ci_pct=bounds,
        divergence=_divergence(np.array([found.kld[n] for n in part.chunks if n in found.kld])),
    )


def _divergence(kld_N2: NDArray[np.float64]) -> Divergence | None:
    """Returns what is known of the divergences of base and finished file, (chunks, 2), or None of no chunk."""
    if not kld_N2.size:
        return None
    columns = (kld_N2[:, 0], kld_N2[:, 1], kld_N2[:, 1] - kld_N2[:, 0])
    base, result, change = (superpopulation_interval(values) for values in columns)
    return Divergence(
        chunks=len(kld_N2),
        base=_finite(base.mean),
        base_ci=_bounds(base),
        result=_finite(result.mean),
        result_ci=_bounds(result),
        change=_finite(change.mean),
        change_ci=_bounds(change),
    )


def _bounds(interval: Interval) -> tuple[float | None, float | None]:
    return (_finite(interval.low), _finite(interval.high))


def _change(
    nll: Sequence[NDArray[np.float32]], rows: Sequence[int]
) -> tuple[float | None, tuple[float | None, float | None]]:
    """Returns the paired change of perplexity from base to finished file on some rows, percent, and its bounds."""
    difference = (nll[2][rows] - nll[1][rows]).mean(axis=1, dtype=np.float64)
    mean, low, high = superpopulation_interval(difference).percent()
    return _finite(mean), (_finite(low), _finite(high))


def verified(checks: Sequence[Check], found: Report, speeds: Speeds | None = None) -> Verified:
    """Returns verify.json; a perplexity that is not finite is a failed check."""
    finite = Check(
        name="finite logits",
        ok=found.result.ppl is not None and found.delta_pct is not None,
        detail=f"{found.result.tokens} tokens scored",
    )
    everything = (*checks, finite)
    return Verified(ok=all(check.ok for check in everything), checks=everything, report=found, speeds=speeds)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
