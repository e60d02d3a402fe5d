"""Judges any files of one model on several texts at once: who is not beaten in both size and damage, and how surely.

Damage is the KL divergence from the source, on the same chunks for all files, averaged over the texts. Chunks are
read in a seeded random order of each text, and no further than the order of the files takes (order.py). One model
is open at a time; the source's predictions for the chunks under way lie on the disk meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from cerebellum import __version__
from cerebellum.comparison.conversations import load_text
from cerebellum.comparison.judgement import (
    LESS,
    MORE,
    Bounds,
    JudgedFile,
    JudgedPair,
    JudgedText,
    Judgement,
    OnText,
)
from cerebellum.comparison.order import (
    Divergences,
    Ordered,
    OrderSettings,
    PairOrder,
    ReadOn,
    order_files,
    stands,
)
from cerebellum.comparison.pair import check_same_tokens
from cerebellum.comparison.published import PAGE, PICTURE
from cerebellum.engine.predictions import PredictionCache
from cerebellum.engine.protocols import Engine
from cerebellum.errors import BadInput
from cerebellum.folder import LEDGER, SETTINGS, RunFolder
from cerebellum.ledger import Ledger
from cerebellum.measure.artifacts import finite_pair
from cerebellum.measure.measurer import Measurer
from cerebellum.measure.race import chunk_order
from cerebellum.progress import Reporter
from cerebellum.shards import Variant
from cerebellum.source import Source, open_source
from cerebellum.stats.paired import as_percent, perplexity
from cerebellum.stats.strata import Looks, StrataMean, Stratum, like_these
from cerebellum.texts import Corpus
from cerebellum.verdicts import drive

JUDGE = "judge.json"
_FIRST_LOOK = 16
_GROWTH = 1.5
"""Chunks of each text at the first look, and how looks grow: fewer say little of skewed divergences."""

_PREDICTIONS = "predictions"
_ONE_TEXT = 0.025  # each side, of a text looked at alone
_TAIL = 0.99

Matrix = NDArray[np.float32]
Vector = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Judging:
    """What to judge. ``texts`` are by name; all damage is from the ``source``.

    Chunks have ``ctx`` tokens. ``chunks`` reads exactly so many of each text in one look; ``max_chunks`` is a limit;
    0 is none. All orders together are wrong with chance ``alpha``, and damages that differ by less than ``tie_pct``
    percent count as alike. ``prediction_bytes`` bounds what the source's predictions take on the disk.
    """

    files: tuple[Path, ...]
    source: Path
    texts: Mapping[str, Path]
    ctx: int = 512
    chunks: int = 0
    max_chunks: int = 0
    seed: int = 1
    alpha: float = 0.05
    tie_pct: float = 2.0
    prediction_bytes: int = 8 << 30


@dataclass(frozen=True, kw_only=True)
class _Text:
    """A text with its chunks in the order in which they are read."""

    name: str
    corpus: Corpus
    order: tuple[int, ...]


def open_judged(request: Judging) -> tuple[Source, tuple[Source, ...]]:
    """Opens the source and all files, headers only.

    Raises BadInput where there are fewer than two files, one of them is the source or there twice, or their
    tokenizers differ, for tokens of different vocabularies cannot be compared.
    """
    if len(request.files) < 2:
        raise BadInput(
            "judge: one file has nothing to be compared with; give two or more, and their --source"
        )
    source = open_source(request.source, allow_requantize=True)
    found: list[Source] = []
    for path in request.files:
        if any(path.resolve() == other.resolve() for other in (request.source, *(one.path for one in found))):
            raise BadInput(f"{path}: is given twice; give each file once, and the source with --source alone")
        found.append(open_source(path, allow_requantize=True))
        check_same_tokens(source, found[-1])
        _check_same_model(source, found[-1])
    return source, tuple(found)


def _check_same_model(source: Source, file: Source) -> None:
    """Raises BadInput where a file is surely of another model: its architecture, or the shape of a tensor, differs."""
    what = f"its architecture is {file.architecture}, not {source.architecture}"
    if file.architecture == source.architecture:
        shared = (name for name in file.tensors if name in source.tensors)
        other = next(
            (name for name in shared if file.tensors[name].shape != source.tensors[name].shape), None
        )
        if other is None:
            return
        what = f"{other!a} has another shape there"
    raise BadInput(f"{file.path}: is no file of {source.path}: {what}; judge files of one model")


def _check_unlike(source: Source, files: Sequence[Source], texts: Sequence[_Text]) -> None:
    """Raises BadInput where two files, or two texts, have the same content: it would count twice."""
    named = [*((one.sha256(), one.path) for one in (source, *files))]
    named += [(text.corpus.sha256, text.corpus.path) for text in texts]
    seen: dict[str, Path] = {}
    for digest, path in named:
        if digest in seen:
            raise BadInput(f"{path}: has the same bytes as {seen[digest]}; give each file and each text once")
        seen[digest] = path


def _state(files: Sequence[Source]) -> list[tuple[Path, int, int]]:
    """Returns what tells that a file was written to: its size and when it was changed."""
    paths = [path for file in files for path in file.paths]
    return [(path, status.st_size, status.st_mtime_ns) for path in paths for status in (path.stat(),)]


def judge(request: Judging, engine: Engine, reporter: Reporter, folder: Path | None = None) -> Judgement:
    """Reads all files on all texts until their order is sure, and returns who survives.

    With a ``folder`` every chunk is kept there, so that a judgement that was stopped goes on, and judge.json is
    written. Raises BadInput where a file or a text cannot be used, or the source's logits are not finite.
    """
    source, files = open_judged(request)
    if not request.texts:
        raise BadInput("judge: there is no text to judge on; give one with --text")
    before = _state((source, *files))
    texts = [
        _text(name, load_text(engine, source, path, request.ctx), request.seed)
        for name, path in request.texts.items()
    ]
    _check_unlike(source, files, texts)
    with _kept_in(folder) as place, closing(Ledger(place / LEDGER)) as ledger:
        desk = _Desk(request, engine, ledger, place, reporter, texts, source, files, before)
        ordered = drive(order_files(desk.settings), desk.answer)
        found = desk.judgement(ordered)
        if folder is not None:
            RunFolder(folder).write(JUDGE, found)
        return found


def _text(name: str, corpus: Corpus, seed: int) -> _Text:
    return _Text(name=name, corpus=corpus, order=chunk_order(corpus.n_chunks, seed))


@contextmanager
def _kept_in(folder: Path | None) -> Iterator[Path]:
    """Holds the folder, or one that is gone afterwards; BadInput where it is a run's, whose ledger is evidence."""
    if folder is None:
        with TemporaryDirectory(prefix="cerebellum-judge-") as made:
            yield Path(made)
        return
    if (folder / SETTINGS).exists():
        raise BadInput(f"{folder}: is a run folder; give the judgement a folder of its own with -o")
    theirs = [folder / name for name in (JUDGE, PAGE, PICTURE, _PREDICTIONS)]
    strange = next((path for path in theirs if path.exists()), None)
    if strange is not None and not (folder / LEDGER).exists():
        raise BadInput(
            f"{strange}: is there already and no judgement of this folder made it; move it, or give another -o"
        )
    with RunFolder(folder).locked():
        yield folder


class _Desk:
    """Reads what the order asks for through the ledger, and puts the judgement together."""

    def __init__(
        self,
        request: Judging,
        engine: Engine,
        ledger: Ledger,
        place: Path,
        reporter: Reporter,
        texts: Sequence[_Text],
        source: Source,
        files: Sequence[Source],
        before: Sequence[tuple[Path, int, int]],
    ) -> None:
        self._before = before
        self._request = request
        self._engine = engine
        self._ledger = ledger
        self._place = place
        self._reporter = reporter
        self._texts = texts
        self._source = source
        self._sources = files
        self._reference = Variant.of_source(source, "source")
        self._names = _names(request.files)
        self._variants = [
            Variant.of_source(file, name) for file, name in zip(files, self._names, strict=True)
        ]
        self._done = 0
        self.settings = self._settings()

    def _settings(self) -> OrderSettings:
        request = self._request
        populations = tuple(text.corpus.n_chunks for text in self._texts)
        longest = max(populations)
        looks = Looks(at=(min(request.chunks, longest),), shares=(1.0,))
        if not request.chunks:
            limit = min(request.max_chunks or longest, longest)
            looks = Looks.planned(_FIRST_LOOK, _GROWTH, limit, longest)
        return OrderSettings(
            files=len(self._variants),
            populations=populations,
            looks=looks,
            alpha=request.alpha,
            tie=request.tie_pct / 100,
        )

    # --- reading

    def answer(self, ask: ReadOn) -> Divergences:
        """Reads the chunks that are new of every text, and returns all that each file has by now."""
        for text in self._texts:
            self._read(text, text.order[self._done : ask.n], [self._variants[number] for number in ask.files])
        self._done = ask.n
        return {
            number: [self._kld_means(number, text, ask.n) for text in self._texts] for number in ask.files
        }

    def _read(self, text: _Text, chunks: Sequence[int], variants: Sequence[Variant]) -> None:
        """Reads chunks with the source and some files, as many at a time as the predictions have room for."""
        n_vocab = self._engine.vocab_size(self._source.path)
        each = text.corpus.scored_per_chunk * n_vocab * 4
        together = self._engine.chunks_together(text.corpus.ctx)
        room = max(1, self._request.prediction_bytes // each)
        room = room // together * together or room  # whole decodes
        for start in range(0, len(chunks), room):
            part = chunks[start : start + room]
            cache = PredictionCache(
                self._place / _PREDICTIONS, part, each, max(each, self._request.prediction_bytes)
            )
            measurer = self._measurer(text, cache)
            measurer.doing = f"{text.name}: "
            try:
                if not np.isfinite(measurer.nll(self._reference, part)).all():
                    raise BadInput(f"{self._source.path}: its logits are not finite on {text.corpus.path}")
                self._check_unchanged()
                for variant in variants:
                    measurer.kld_means(variant, part)
                    self._check_unchanged()
            finally:
                measurer.close()
                cache.remove()

    def _check_unchanged(self) -> None:
        """Raises BadInput where a file was written to since it was hashed: what was read is of nobody knows what."""
        now = _state((self._source, *self._sources))
        changed = next((old[0] for old, new in zip(self._before, now, strict=True) if old != new), None)
        if changed is not None:
            raise BadInput(
                f"{changed}: changed while it was judged; judge it again once nothing writes to it, in a new folder"
            )

    def _measurer(self, text: _Text, cache: PredictionCache | None = None) -> Measurer:
        return Measurer(
            self._engine,
            self._ledger,
            text.corpus,
            self._reporter,
            reference=self._reference,
            cache=cache,
            order=text.order,
        )

    def _compared(self, variant: Variant, text: _Text, n: int) -> tuple[Matrix, Matrix]:
        return self._measurer(text).compared(variant, text.order[:n])

    # --- the judgement

    def judgement(self, ordered: Ordered) -> Judgement:
        """Puts together judge.json from what was read."""
        standing = stands(ordered, [file.n_bytes for file in self._sources])
        files = []
        for number, stand in enumerate(standing):
            against = (stand.by,) if stand.by is not None else stand.open_to
            kld, bounds = self._overall(number, ordered)
            files.append(
                JudgedFile(
                    name=self._names[number],
                    file=self._sources[number].path.name,
                    sha256=self._variants[number].digest,
                    bytes=self._sources[number].n_bytes,
                    standing=stand.standing,
                    against=tuple(self._names[other] for other in against),
                    confidence=stand.confidence,
                    kld_mean=kld,
                    kld_ci=bounds,
                    texts=tuple(self._on_text(number, text, ordered) for text in self._texts),
                )
            )
        return self._whole(tuple(files), ordered)

    def _whole(self, files: tuple[JudgedFile, ...], ordered: Ordered) -> Judgement:
        request = self._request
        ends = [self._done, *(self._n_read(number, ordered) for number in range(len(files)))]
        read = sum(min(n, text.corpus.n_chunks) for n in ends for text in self._texts)
        return Judgement(
            cerebellum=__version__,
            llama_cpp=self._engine.build,
            source=self._source.path.name,
            source_sha256=self._reference.digest,
            source_bytes=self._source.n_bytes,
            ctx=request.ctx,
            seed=request.seed,
            alpha=request.alpha,
            tie_pct=request.tie_pct,
            sure=ordered.sure,
            tokens_scored=read * request.ctx,
            texts=tuple(self._judged_text(text) for text in self._texts),
            files=files,
            pairs=tuple(self._pair(pair, ordered) for pair in ordered.pairs),
        )

    def _judged_text(self, text: _Text) -> JudgedText:
        return JudgedText(
            name=text.name,
            file=text.corpus.path.name,
            sha256=text.corpus.sha256,
            chunks=min(self._done, text.corpus.n_chunks),
            of_chunks=text.corpus.n_chunks,
        )

    def _n_read(self, number: int, ordered: Ordered) -> int:
        return self.settings.looks.at[ordered.last_look[number]]

    def _level(self, number: int, ordered: Ordered) -> float:
        """Returns what each side of a figure's interval may spend at the file's last look.

        A last look that is exact for the texts has no share; of text like them it says what a look with the least may.
        """
        shares = self.settings.looks.shares
        share = shares[ordered.last_look[number]] or min(share for share in (*shares, 1.0) if share)
        return self._request.alpha / 2 * share

    def _overall(self, number: int, ordered: Ordered) -> tuple[float | None, Bounds | None]:
        """Returns the mean divergence over the texts with its interval, for text like these."""
        if number in ordered.collapsed:
            return None, None
        n = self._n_read(number, ordered)
        means = [self._kld_means(number, text, n) for text in self._texts]
        found = StrataMean.of([like_these(values) for values in means]).interval(self._level(number, ordered))
        return found.mean, finite_pair(found.low, found.high)

    def _kld_means(self, number: int, text: _Text, n: int) -> Vector:
        return np.asarray(self._compared(self._variants[number], text, n)[0].mean(axis=1, dtype=np.float64))

    def _on_text(self, number: int, text: _Text, ordered: Ordered) -> OnText:
        n = self._n_read(number, ordered)
        chunks = text.order[:n]
        measurer = self._measurer(text)
        kld, same = measurer.compared(self._variants[number], chunks)
        nll = measurer.nll(self._variants[number], chunks)
        against = measurer.nll(self._reference, chunks)
        return on_text(text.name, kld, same, nll, against, self._level(number, ordered))

    def _pair(self, pair: PairOrder, ordered: Ordered) -> JudgedPair:
        difference = pair.difference
        return JudgedPair(
            a=self._names[pair.a],
            b=self._names[pair.b],
            order=pair.order,
            kld_difference=difference.mean,
            ci=finite_pair(difference.low, difference.high),
            confidence=max(0.0, 1 - pair.wrong),
            reversed_on=tuple(self._reversed_on(pair, ordered)),
        )

    def _reversed_on(self, pair: PairOrder, ordered: Ordered) -> Iterator[str]:
        """Yields the texts that, looked at alone, surely have a settled pair the other way round."""
        if pair.order not in (LESS, MORE):
            return
        n = min(self._n_read(number, ordered) for number in (pair.a, pair.b))
        for text in self._texts:
            values = self._kld_means(pair.a, text, n) - self._kld_means(pair.b, text, n)
            stratum = Stratum(values_N=values, population=text.corpus.n_chunks)
            found = StrataMean.of([stratum]).interval(_ONE_TEXT)
            if found.low > 0 > pair.difference.mean or found.high < 0 < pair.difference.mean:
                yield text.name


def on_text(name: str, kld: Matrix, same: Matrix, nll: Matrix, against: Matrix, level: float) -> OnText:
    """Returns the figures of one file on one text from vectors of tokens, all (chunks, scored tokens).

    Every interval is of text like this, the chunk its unit, and each of its sides wrong with chance ``level``.
    """
    if not (np.isfinite(kld).all() and np.isfinite(nll).all()):
        return OnText(text=name, chunks=len(kld), **dict.fromkeys(_FIGURES))
    mean, mean_ci = _with_bounds(kld.mean(axis=1, dtype=np.float64), level)
    top, top_ci = _with_bounds(same.mean(axis=1, dtype=np.float64), level)
    delta, delta_ci = _with_bounds((nll - against).mean(axis=1, dtype=np.float64), level)
    tail, tail_ci = percentile(kld, _TAIL, level)
    return OnText(
        text=name,
        chunks=len(kld),
        kld_mean=mean,
        kld_ci=mean_ci,
        kld_p99=tail,
        kld_p99_ci=tail_ci,
        top1=top,
        top1_ci=(max(0.0, top_ci[0]), min(1.0, top_ci[1])) if top_ci else None,
        ppl=perplexity(nll).ppl,
        source_ppl=perplexity(against).ppl,
        delta_pct=as_percent(delta),
        ci_pct=(as_percent(delta_ci[0]), as_percent(delta_ci[1])) if delta_ci else None,
    )


_FIGURES = (
    *("kld_mean", "kld_ci", "kld_p99", "kld_p99_ci", "top1", "top1_ci"),
    *("ppl", "source_ppl", "delta_pct", "ci_pct"),
)


def _with_bounds(values_N: Vector, level: float) -> tuple[float, Bounds | None]:
    found = StrataMean.of([like_these(values_N)]).interval(level)
    return found.mean, finite_pair(found.low, found.high)


def percentile(values_NS: Matrix, share: float, level: float) -> tuple[float, Bounds | None]:
    """Returns the value that ``share`` of all tokens stay below, with bounds, (chunks, tokens) given.

    The bounds are Woodruff's (1952, Journal of the American Statistical Association 47): the share of tokens below
    the value varies from chunk to chunk, and the interval of that share is read back through the values.
    """
    tokens = np.sort(values_NS.ravel())
    at = float(np.quantile(tokens, share))
    below_N = (values_NS <= at).mean(axis=1, dtype=np.float64)
    found = StrataMean.of([like_these(below_N)]).interval(level)
    half = found.high - found.mean
    if not math.isfinite(half):
        return at, None
    low, high = (float(np.quantile(tokens, min(max(share + step, 0.0), 1.0))) for step in (-half, half))
    return at, (low, high)


def _names(paths: Sequence[Path]) -> list[str]:
    """Returns the files' names without their ending, with the folder where two are alike, or with all of the path."""
    stems = [path.stem for path in paths]
    if len(set(stems)) < len(stems):
        stems = [f"{path.parent.name}/{path.stem}" for path in paths]
    if len(set(stems)) < len(stems):
        stems = [str(path) for path in paths]
    return stems
