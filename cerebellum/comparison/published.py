"""A judgement as people see it: rows of text for the console and for judge.md, and the picture judge.png."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from cerebellum.comparison.judgement import LESS, OPEN, TIE, Bounds, JudgedFile, Judgement, OnText
from cerebellum.files import atomic_write_bytes, atomic_write_text
from cerebellum.page.markdown import code_span, escape_text
from cerebellum.units import percent, size

PICTURE = "judge.png"
PAGE = "judge.md"

SURVIVORS = ("file", "size", "KL divergence", "stands", "confidence")
ON_TEXT = ("file", "chunks", "KL mean", "KL 99%", "same top token", "perplexity", "against the source")
_MOST_SURE = 0.9999  # what is surer is told as more than this


def survivors_rows(found: Judgement) -> list[tuple[str, ...]]:
    """Returns a row for each file, the smallest first: its size, its divergence over the texts, where it stands."""
    return [
        (
            file.name,
            size(file.bytes),
            _told(file.kld_mean, file.kld_ci, ".5f"),
            _stands(file),
            _confidence(file.confidence) if place else "nothing is smaller",
        )
        for place, file in enumerate(by_size(found))
    ]


def text_rows(found: Judgement, name: str) -> list[tuple[str, ...]]:
    """Returns a row for each file on one text, the smallest file first."""
    return [_text_row(file.name, on) for file in by_size(found) for on in file.texts if on.text == name]


def by_size(found: Judgement) -> list[JudgedFile]:
    """Returns the files from the smallest to the largest."""
    return sorted(found.files, key=lambda file: (file.bytes, file.kld_mean or math.inf))


def _text_row(name: str, on: OnText) -> tuple[str, ...]:
    shares = tuple(100 * bound for bound in on.top1_ci) if on.top1_ci else None
    top = None if on.top1 is None else 100 * on.top1
    return (
        name,
        str(on.chunks),
        _told(on.kld_mean, on.kld_ci, ".5f"),
        _told(on.kld_p99, on.kld_p99_ci, ".3f"),
        _told(top, (shares[0], shares[1]) if shares else None, ".2f", "%"),
        "collapsed" if on.ppl is None else f"{on.ppl:.4f}",
        "collapsed" if on.delta_pct is None else percent(on.delta_pct, on.ci_pct),
    )


def _told(value: float | None, bounds: Bounds | None, digits: str, unit: str = "") -> str:
    if value is None:
        return "collapsed"
    text = f"{value:{digits}}{unit}"
    return text + (f" [{bounds[0]:{digits}}, {bounds[1]:{digits}}]" if bounds else "")


def _stands(file: JudgedFile) -> str:
    others = ", ".join(file.against)
    match file.standing:
        case "survives" | "collapsed":
            return file.standing
        case "beaten":
            return f"beaten by {others}"
        case "matched":
            return f"no better than {others}, which is no larger"
        case "open":
            return f"open: {others} may be better"


def _confidence(value: float | None) -> str:
    if value is None:
        return "-"
    return f"over {100 * _MOST_SURE:.2f}%" if value > _MOST_SURE else f"{100 * value:.2f}%"


def summary(found: Judgement) -> list[str]:
    """Says how far the reading went and why it stopped, how sure the whole is, and where texts disagree."""
    read = ", ".join(f"{text.name} {text.chunks} of {text.of_chunks}" for text in found.texts)
    end = "the order of all files was sure" if found.sure else "there was no more to read"
    sure = f"{100 - 100 * found.alpha:g}%"
    lines = [
        f"read until {end}: chunks of {found.ctx} tokens, {read}; {found.tokens_scored:,} tokens scored",
        f"all orders hold together with {sure} confidence for these texts ({len(found.pairs)} pairs, each look "
        f"counted); damages within {found.tie_pct:g}% of each other count as alike; the interval of a figure holds "
        f"at {sure} by itself, for text like these",
    ]
    return [*lines, *_open_pairs(found), *_disagreements(found)]


def _open_pairs(found: Judgement) -> Iterator[str]:
    unknown = [f"{pair.a} and {pair.b}" for pair in found.pairs if pair.order == OPEN]
    alike = [f"{pair.a} and {pair.b}" for pair in found.pairs if pair.order == TIE]
    if unknown:
        yield f"not told apart: {'; '.join(unknown)}"
    if alike:
        yield f"alike: {'; '.join(alike)}"


def _disagreements(found: Judgement) -> Iterator[str]:
    for pair in found.pairs:
        if pair.reversed_on:
            better, worse = (pair.a, pair.b) if pair.order == LESS else (pair.b, pair.a)
            yield f"{better} does less damage than {worse} over all texts, and more on {', '.join(pair.reversed_on)}"


def publish(folder: Path, found: Judgement) -> tuple[Path, Path]:
    """Writes judge.md and judge.png, and returns their paths."""
    page = folder / PAGE
    drawn = folder / PICTURE
    atomic_write_bytes(drawn, _picture(found))
    atomic_write_text(page, "\n".join(_page(found)) + "\n")
    return page, drawn


def _page(found: Judgement) -> Iterator[str]:
    yield f"# {escape_text(found.source)}: {len(found.files)} files judged"
    yield ""
    yield f"![Size against KL divergence from the source]({PICTURE})"
    yield ""
    yield from _table(SURVIVORS, survivors_rows(found))
    for text in found.texts:
        yield ""
        yield f"## {escape_text(text.name)}"
        yield ""
        yield f"{code_span(text.file)}, sha256 {code_span(text.sha256[:16])}"
        yield ""
        yield from _table(ON_TEXT, text_rows(found, text.name))
    yield ""
    for line in summary(found):
        yield f"- {escape_text(line[:1].upper() + line[1:])}."
    yield f"- Seed {found.seed}, Cerebellum {escape_text(found.cerebellum)}, {escape_text(found.llama_cpp)}."


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(titles)} |"
    yield f"|{' --- |' * len(titles)}"
    for row in rows:
        first, *others = row
        yield f"| {code_span(first)} | {' | '.join(escape_text(cell) for cell in others)} |"


def _picture(found: Judgement) -> bytes:
    from cerebellum.page.charts import JudgedMark, judged_chart  # matplotlib takes a second to load
    from cerebellum.page.pictures import picture

    large = all(file.bytes >= 1e9 for file in found.files)
    marks = [
        JudgedMark(
            name=file.name,
            size=file.bytes / (1e9 if large else 1e6),
            damage=file.kld_mean,
            bounds=file.kld_ci or (file.kld_mean, file.kld_mean),
            survives=file.standing == "survives",
        )
        for file in by_size(found)
        if file.kld_mean is not None
    ]
    unit = "GB" if large else "MB"
    title = "Size against KL divergence from the source"
    return picture("judge", title, lambda width: judged_chart(width, marks, unit)).png
