"""Rows of the card's and the report's tables, as text.

A table has no blanks: words say why where there is no number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cerebellum.card.evidence import Benchmark, Evidence, FinishedRun, GroupRow
from cerebellum.card.numbers import nats, percent, points, spans, with_interval
from cerebellum.card.story import Story
from cerebellum.groups import SourceFile
from cerebellum.manifest import EncoderNamed, Manifest
from cerebellum.memory.shape import GPUS_GIB, contexts, memory_shape
from cerebellum.units import count, gib, size
from cerebellum.verify import Measured

_COLOURED = ("tolerant", "sensitive", "collapsed", "promoted", "demoted")


@dataclass(frozen=True, kw_only=True)
class GroupCells:
    """Holds a group as a row of text, for the tables of card and report alike.

    ``colour`` is the report's CSS class of its verdict; ``partners`` are the groups that were measured with it.
    """

    name: str
    tensors: int
    layers: str
    types: str
    tried: str
    change: str
    partners: tuple[str, ...]
    chunks: str
    saves: str
    rate: str
    verdict: str
    colour: str
    kld: str


@dataclass(frozen=True, kw_only=True)
class PerplexityCells:
    """Holds the perplexity of one model on the report text, its standard error, and its change against
    the base.
    """

    name: str
    ppl: str
    se: str
    change: str


@dataclass(frozen=True, kw_only=True)
class BenchmarkCells:
    """Holds one benchmark, scored in one way, of the finished file and of its base on the same
    questions.
    """

    task: str
    protocol: str
    n: str
    accuracy: str
    base: str
    difference: str
    p: str
    could_show: str


@dataclass(frozen=True, kw_only=True)
class MemoryCells:
    """The memory that one context takes; ``fits`` has an answer for each gpu, ``gpus`` says it in words."""

    context: str
    weights: str
    cache: str
    compute: str
    total: str
    fits: tuple[bool, ...]
    gpus: str


def group_cells(row: GroupRow, story: Story) -> GroupCells:
    """Writes a group, with its price of a byte as the story tells it.

    Where nothing was measured a cell says so.
    """
    saved = row.bytes_saved
    return GroupCells(
        name=row.name,
        tensors=row.tensors,
        layers=_layers(row, story.evidence.run.source),
        types=f"{row.base_type} → {row.chosen_type}" if row.changed else row.base_type,
        tried=row.tried_type,
        change=with_interval(row.change) if row.change else "not measured",
        partners=row.together_with,
        chunks=f"{row.chunks:,}" if row.chunks else "none",
        saves=size(saved) if saved >= 0 else f"adds {size(-saved)}",
        rate=story.rate(row),
        verdict=f"{row.verdict} (near tie)" if row.near_tie else row.verdict,
        colour=f"v-{row.verdict}" if row.verdict in _COLOURED else "",
        kld=nats(row.kld.mean) if row.kld else "not measured",
    )


def _layers(row: GroupRow, source: SourceFile) -> str:
    """Says that a group lies in all layers, in all of one kind, or in which."""
    found = set(row.layers)
    attends = set(source.attention_layers)
    if not found:
        return "outside the layers"
    if len(found) == source.layers:
        return f"all {len(found)}"
    if found == attends:
        return f"attention ({len(found)})"
    if len(found) == source.recurrent_layers and not found & attends:
        return f"recurrent ({len(found)})"
    return spans(row.layers)


def perplexity_cells(evidence: Evidence) -> list[PerplexityCells]:
    """Writes source, base and finished file, in that order; the base is what the others are measured by."""
    report = evidence.run.report
    source = report.source.ppl
    base = report.base.ppl
    against = percent(100 * (source / base - 1)) if source and base else "not finite"
    return [
        _perplexity("source", report.source, against),
        _perplexity(f"base ({evidence.plan.base})", report.base, "the measure"),
        _perplexity("this file", report.result, with_interval(evidence.run.reported)),
    ]


def _perplexity(name: str, measured: Measured, change: str) -> PerplexityCells:
    ppl, se = ("not finite" if x is None else f"{x:.4f}" for x in (measured.ppl, measured.se))
    return PerplexityCells(name=name, ppl=ppl, se=se, change=change)


def benchmark_cells(bench: Benchmark) -> BenchmarkCells:
    """Writes a benchmark of the finished file beside its base.

    What needs a base says so where none was asked, for a table has no blanks.
    """
    accuracy = bench.accuracy
    return BenchmarkCells(
        task=bench.task,
        protocol=f"{bench.protocol}, {bench.metric}",
        n=f"{bench.n:,}",
        accuracy=f"{accuracy.mean:.1f}% [{accuracy.low:.1f}, {accuracy.high:.1f}]",
        base=f"{bench.base:.1f}%" if bench.base is not None else "not asked",
        difference=points(bench.difference) if bench.difference else "not paired",
        p=f"{bench.p:.2g}" if bench.p is not None else "not paired",
        could_show=f"±{bench.detectable:.1f}" if bench.detectable is not None else "not known",
    )


def memory_cells(evidence: Evidence) -> list[MemoryCells]:
    """Writes the memory at 4K, 32K and the full context, with the sizes of gpu that it fits on."""
    source = evidence.run.source
    weights = evidence.plan.tensor_bytes
    shape = memory_shape(source.metadata, source.attention_layers, source.recurrent_layers, weights)
    rows = []
    for context in contexts(source.context_length):
        memory = shape.at(context)
        fits = tuple(memory.runs_on(gpu) for gpu in GPUS_GIB)
        rows.append(
            MemoryCells(
                context=f"{context:,}",
                weights=gib(memory.weights),
                cache=gib(memory.cache + memory.state),
                compute=gib(memory.compute),
                total=gib(memory.total),
                fits=fits,
                gpus=_smallest_gpu(fits),
            )
        )
    return rows


def _smallest_gpu(fits: Sequence[bool]) -> str:
    if not any(fits):
        return f"none of {GPUS_GIB[-1]} GB or less"
    return f"{GPUS_GIB[list(fits).index(True)]} GB and more"


def architecture(source: SourceFile) -> list[tuple[str, str]]:
    """Writes the model at a glance, from the facts of its header alone; rows that do not apply to it
    are left out.
    """
    attends = source.attention_layers
    rows = [
        ("architecture", source.architecture),
        ("parameters", count(source.parameters)),
        ("active for a token", count(source.active_parameters)),
        ("layers", str(source.layers)),
        ("attention in layers", "all" if len(attends) == source.layers else spans(attends)),
        ("recurrent layers", str(source.recurrent_layers or "")),
        ("experts", f"{source.experts}, {source.experts_used} used for a token" if source.experts else ""),
        ("context", f"{source.context_length:,} tokens" if source.context_length else ""),
        ("vocabulary", f"{source.metadata.get('vocabulary', 0):,} tokens"),
        ("source file", size(source.bytes)),
    ]
    return [(name, value) for name, value in rows if value]


def _moments(encoder: EncoderNamed) -> list[tuple[str, str, str]]:
    """Lists the second moments that our encoder fed errors back by, where it did."""
    named = encoder.moments
    return [("second moments", named.file, named.sha256)] if named else []


def _results(manifest: Manifest) -> list[tuple[str, str, str]]:
    """Lists the finished files, every split of them, and the projectors beside them."""
    several = len(manifest.results) > 1
    found = [
        (f"file {number}" if several else "this file", named.file, named.sha256)
        for number, result in enumerate(manifest.results, start=1)
        for named in result.files
    ]
    return found + [("projector", named.file, named.sha256) for named in manifest.projectors]


def provenance(run: FinishedRun) -> list[tuple[str, str, str]]:
    """Lists what made what: the part, its name, and the sha256 of its content, by which a stranger can
    tell whether it is the same.
    """
    manifest = run.manifest
    texts = [
        (f"{part} text", manifest.text_files.get(part, ""), digest) for part, digest in manifest.texts.items()
    ]
    return [
        ("source", ", ".join(manifest.source.files), manifest.source.sha256),
        ("importance matrix", manifest.imatrix.file, manifest.imatrix.sha256),
        *_moments(manifest.encoder),
        *texts,
        ("measurements", "ledger.sqlite", manifest.ledger_digest),
        *_results(manifest),
    ]
