"""A real model at the sizes of four presets: the preset, two rivals, and Cerebellum in several ways.

    python benchmarks/real.py MODEL --gpu-layers -1 --threads 16 --folder DIR

Runs on prose and code choose, one for all sizes that have the same base; loss and KL divergence from the source are
then measured on texts that chose nothing: WikiText-2 test, and modules of Python's standard library that the
selection has not. All files of a size are of the same source, importance matrix and bytes. Later runs begin with the
first one's shards, so that only its seconds are those of a run from nothing. A part that was broken off goes on with
the same command, and ``--minutes`` bounds the scoring: all files get the same chunks, as many as there was time for.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import budget as rivals
import numpy as np
from code_texts import REPORT_MODULES, SELECT_MODULES, code_text
from common import RESULTS, Vector, articles, bounds, cerebellum, reference, save, save_vectors, score
from making import Maker
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from cerebellum import open_run
from cerebellum.base import base_for, preset_base
from cerebellum.bench.stage import BenchRequest, bench_files
from cerebellum.codec import as_json
from cerebellum.engine.protocols import Engine
from cerebellum.folder import IMATRIX, MOMENTS
from cerebellum.gguf import parse_type, tensor_bytes
from cerebellum.layout import Layout
from cerebellum.llama.library import build_id, devices
from cerebellum.llama.native import EngineSettings, LlamaEngine
from cerebellum.measure.measurer import measuring
from cerebellum.measure.race import chunk_order
from cerebellum.plan.artifacts import BudgetPlan
from cerebellum.progress import Silent
from cerebellum.settings import K_LADDER, REPORT_TEXT, SELECTION_TEXT, Budget, Preset
from cerebellum.source import open_source
from cerebellum.stats.clusters import less_than_reference, mean_by_cluster
from cerebellum.stats.holm import holm
from cerebellum.texts import Corpus, load_corpus
from cerebellum.workspace import Workspace

Numbers = NDArray[np.int64]

PARTS = ("plan", "threshold", "prose", "allocate", "quality", "speed", "questions")
FURTHER = {  # runs at one size, and what their files are called
    "prose": "Cerebellum, chosen on prose alone",
    "threshold": "limit of 3%",
}
ALLOCATED = "Cerebellum, head and embeddings too"
SIZES = ("Q2_K", "IQ3_XXS", "Q3_K_M", "IQ4_XS")
COMPARED = "Q3_K_M"  # the size of the run on prose alone, of the threshold run's base and of the questions
PRESET = "preset"
OURS = "Cerebellum"
SOURCE = "source"
ASKED_PCT = 40.0  # less KL divergence than the preset


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One file of a size, by what made it; ``path`` is there once somebody has made it."""

    size: str
    maker: str
    path: Future[Path | None]

    @property
    def name(self) -> str:
        """Returns what its scores are kept under."""
        return "-".join(f"{self.size} {self.maker}".replace(",", "").split())


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text that reports, with its chunks in the order in which they are scored and the document that each is of.

    The order is drawn once, so that any beginning of it has chunks of all documents.
    """

    name: str
    corpus: Corpus
    order_N: Numbers
    document_N: Numbers

    @property
    def chunks(self) -> int:
        """Returns how many chunks are wanted."""
        return len(self.order_N)


@dataclass(kw_only=True)
class Real:
    """The benchmark under way: what was asked, and what was found, which is written after every part."""

    asked: argparse.Namespace
    found: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    @property
    def folder(self) -> Path:
        """Returns the folder that everything lies in."""
        return Path(self.asked.folder)

    @property
    def minutes(self) -> float:
        """Returns how long it has run."""
        return (time.monotonic() - self.began) / 60

    @property
    def engine(self) -> LlamaEngine:
        """Returns the engine that was asked for."""
        return LlamaEngine(EngineSettings(threads=self.asked.threads, gpu_layers=self.asked.gpu_layers))

    def save(self) -> Path:
        """Writes what was found so far, into what another process may have written of other parts."""
        known = RESULTS / f"{self.asked.name}.json"
        self.found = merged(json.loads(known.read_text()) if known.exists() else {}, self.found)
        return save(self.asked.name, self.found)

    def code(self, which: str, modules: Sequence[str]) -> Path:
        """Returns the text of code that selects, or the one that reports."""
        return code_text(self.folder / f"{which}-code.txt", modules)

    # --- runs

    def run(self, name: str, *options: str | Path) -> None:
        """Runs ``cerebellum run`` into a folder, where no finished run is."""
        folder = self.folder / name
        if not (folder / "manifest.json").exists():
            asked = self.asked
            shared = ["--imatrix-chunks", str(asked.imatrix_chunks), "--report-text", "prose"]
            shared += ["--report-chunks", "8"]
            machine = ["--threads", str(asked.threads), "--gpu-layers", str(asked.gpu_layers)]
            requantize = ["--allow-requantize"]
            _, seconds = cerebellum(
                "run", asked.model, "-o", folder, *options, *shared, *machine, *requantize
            )
            self.found.setdefault("seconds", {})[name] = seconds
            self.save()

    def mixed(self) -> list[str]:
        """Returns the options for a selection text of prose and code, or for the texts that were asked for."""
        code = self.code("select", SELECT_MODULES)
        texts = self.asked.select_text or [f"prose={SELECTION_TEXT}", f"code={code}"]
        return [part for text in texts for part in ("--select-text", text)]

    def runs(self, name: str) -> dict[str, Path]:
        """Returns the folder of each base's run."""
        return {base: self.folder / f"{name}-{base}" for base in self.bases}

    @property
    def bases(self) -> dict[str, list[str]]:
        """Returns the sizes by the base that a run for one of them alone has."""
        found: dict[str, list[str]] = {}
        for size in self.asked.sizes:
            found.setdefault(base_for(Budget(sizes=(Preset(name=size),))), []).append(size)
        return found

    def sized_runs(self, name: str, like: str, *options: str) -> None:
        """Runs a budget run for the sizes of each base, on prose and code, with the shards that others made."""
        made = [folder for folder in self.runs(like).values() if folder.exists()]
        for base, sizes in self.bases.items():
            folder = f"{name}-{base}"
            begin_like(made[0] if made else None, self.folder / folder)
            self.run(folder, "--budget", ",".join(sizes), "--base", base, *options, *self.mixed())
            made.append(self.folder / folder)

    def plan(self) -> None:
        """Runs budget runs, as they are by default."""
        self.sized_runs("run", "run", "--keep-shards")

    def prose(self) -> None:
        """Runs a budget run at one size on prose alone, which was the default before texts of six domains were."""
        self.run("prose", "--budget", self.compared, "--select-text", "prose")

    def threshold(self) -> None:
        """Runs the published method at a limit of 3%."""
        most = ("--max-chunks", str(self.asked.threshold_chunks))
        self.run("threshold", "--max-increase", "3%", "--base", self.compared, *most, *self.mixed())

    def allocate(self) -> None:
        """Runs budget runs that plan output head and embeddings, too."""
        self.sized_runs("allocate", "run", "--keep-shards", "--allocate", "head,embd")

    @property
    def compared(self) -> str:
        """Returns the size at which one thing is compared that the others are not."""
        return COMPARED if COMPARED in self.asked.sizes else str(self.asked.sizes[0])

    # --- what is judged

    def planned(self, name: str) -> dict[str, tuple[Path, BudgetPlan, str]]:
        """Returns every finished file of some runs by its size, with its plan and the base of its run."""
        return {
            plan.file_label: (path, plan, base)
            for base, folder in self.runs(name).items()
            for path, plan in results(folder)
        }

    def candidates(self, workspace: Workspace, pool: ThreadPoolExecutor) -> list[Candidate]:
        """Returns all files; those that are not there yet are made one after the other beside the scoring."""
        maker = Maker(workspace=workspace, folder=self.folder / "files")
        sets = self.rivals(workspace, maker) if self.asked.rivals else None
        allocated = self.planned("allocate")
        made = []
        for size, planned in self.planned("run").items():
            ways = self.ways(maker, sets, size, *planned)
            if size in allocated:
                ways[ALLOCATED] = partial(Path, allocated[size][0])
            made += [Candidate(size=size, maker=name, path=pool.submit(way)) for name, way in ways.items()]
        for name, label in FURTHER.items():
            for path, _ in results(self.folder / name):
                made.append(Candidate(size=self.compared, maker=label, path=pool.submit(partial(Path, path))))
        return made

    def rivals(self, workspace: Workspace, maker: Maker) -> Rivals:
        """Returns the rivals, measured where one of their files is not there yet."""
        sets = Rivals(bench=rivals.Bench(workspace=workspace, folder=self.folder), workspace=workspace)
        if not all((maker.folder / f"{size}-bands.gguf").exists() for size in self.asked.sizes):
            sets.measure()
        return sets

    def ways(
        self, maker: Maker, sets: Rivals | None, size: str, ours: Path, plan: BudgetPlan, base: str
    ) -> dict[str, Callable[[], Path | None]]:
        """Returns what makes each file of one size, by who made it."""
        workspace = maker.workspace
        engine, source, matrix = workspace.engine, workspace.source, workspace.matrix
        preset = preset_base(engine, source, size, matrix)
        layout: Layout = replace(workspace.layout, base=preset_base(engine, source, base, matrix))
        types = {name: parse_type(qtype) for name, qtype in plan.tensor_types.items()}

        def plain() -> Path | None:
            alone = [each for each in plan.candidates if each.how == "K-quants alone"]
            if not alone:
                return None
            return maker.write(f"{size}-k-quants", layout.types(alone[0].changes), "ours")

        found: dict[str, Callable[[], Path | None]] = {
            PRESET: partial(maker.write, f"{size}-preset", preset.types, "ggml", preset),
            OURS: lambda: ours,
            "Cerebellum, ggml's codes": partial(maker.write, f"{size}-ggml", types, "ggml"),
            "Cerebellum, K-quants": plain,
            "preset, our codes": partial(maker.write, f"{size}-preset-ours", preset.types, "ours", preset),
        }
        if sets is not None:
            of_bands, of_mse = sets.bands, sets.mse
            n_bytes = plan.budget_bytes
            found["depth bands"] = lambda: maker.write(f"{size}-bands", of_bands(n_bytes), "ours")
            found["weighted MSE"] = lambda: maker.write(f"{size}-mse", of_mse(n_bytes), "ours")
        return found

    # --- scoring

    def texts(self, workspace: Workspace) -> list[Text]:
        """Returns the texts that report, with as many of their chunks as are wanted."""
        engine = workspace.engine
        model = workspace.source.path
        files = {"code": self.code("report", REPORT_MODULES), "prose": REPORT_TEXT}
        found = []
        for name, path in files.items():
            corpus = load_corpus(engine, model, path, 512)
            wanted = min(self.asked.chunks or corpus.n_chunks, corpus.n_chunks)
            order = np.random.default_rng(1).permutation(corpus.n_chunks)[:wanted]
            documents = np.array(articles(engine, model, corpus))[order]
            found.append(Text(name=name, corpus=corpus, order_N=order, document_N=documents))
        return found

    def quality(self) -> None:
        """Scores every file on every text, a block of chunks after the other, until the time is over."""
        *_, folder = self.runs("run").values()
        workspace = Workspace.reopen(folder, rivals.engine_for, Silent())
        with workspace.locked(), ThreadPoolExecutor(1) as pool:
            _ = workspace.shards, workspace.encoder, workspace.matrix, workspace.base
            candidates = self.candidates(workspace, pool)
            texts = self.texts(workspace)
            scores = Scores(folder=self.folder / "scores")
            longest = 0.0
            for block in blocks(texts, self.asked.block):
                if longest and self.minutes + longest > self.asked.minutes:
                    self.found["broken_off"] = f"after {self.minutes:.1f} minutes, before {block.name}"
                    break
                began = self.minutes
                scores.measure(workspace.engine, workspace.source.paths, block, candidates)
                longest = max(longest, self.minutes - began)
                self.judge(texts, candidates, scores)

    def judge(self, texts: Sequence[Text], candidates: Sequence[Candidate], scores: Scores) -> None:
        """Works out what the scores say, and writes it."""
        told: dict[str, Any] = {}
        for text in texts:
            n = scores.common(text, [candidate.name for candidate in candidates if made(candidate)])
            for size in self.asked.sizes if n else ():
                of_size = [each for each in candidates if each.size == size and made(each)]
                rows = judged(text, n, of_size, scores, Path(self.asked.model))
                told.setdefault(text.name, {})[size] = rows
                show(f"{text.name}, size of {size}, {n} chunks", rows)
        self.found["quality"] = told
        self.found["texts"] = {text.name: described(text) for text in texts}
        save_vectors(self.asked.name, scores.vectors(texts))
        print(self.save(), flush=True)

    # --- speed and questions

    def files(self, makers: Iterable[str]) -> dict[str, Path]:
        """Returns the files of some makers that are there, by size and maker, and the source first."""
        planned = {size: path for size, (path, *_) in self.planned("run").items()}
        if not planned:
            sys.exit(f"{self.folder}: holds no finished run; --parts plan,quality come first")
        found = {SOURCE: Path(self.asked.model)}
        for size in self.asked.sizes:
            for maker in makers:
                path = (
                    planned[size] if maker == OURS else self.folder / "files" / f"{size}-{SUFFIX[maker]}.gguf"
                )
                if path.exists():
                    found[f"{size} {maker}"] = path
        return found

    def speed(self) -> None:
        """Times a prompt and generation with each file, one after the other."""
        self.save()
        told = self.found.setdefault("speed", {})
        for name, path in self.files((PRESET, OURS, "Cerebellum, K-quants")).items():
            if name not in told:
                told[name] = as_json(self.engine.speed(open_source(path, allow_requantize=True).paths))
                told[name]["bytes"] = path.stat().st_size
                print(f"{name}: {told[name]['generation']:.1f} tokens/s generated", flush=True)
        self.save()

    def questions(self) -> None:
        """Asks source, preset and ours at one size the same questions, in both protocols."""
        wanted = [f"{self.compared} {OURS}", f"{self.compared} {PRESET}", SOURCE]
        there = self.files((PRESET, OURS))
        models = [there[name] for name in wanted if name in there]
        data = self.asked.data
        request = BenchRequest(limit=self.asked.questions, data=data)
        began = time.monotonic()
        found = bench_files(models, request, self.engine.asker, self.folder / "questions", Silent())
        significant = holm([row.p_value for row in found.paired])
        self.found["questions"] = {
            "seconds": time.monotonic() - began,
            "models": dict(zip((row.name for row in found.models), wanted, strict=False)),
            "scores": as_json(found.scores),
            "paired": [
                as_json(row) | {"significant_by_holm": sure}
                for row, sure in zip(found.paired, significant, strict=True)
            ],
            "session": as_json(found.session),
            "problems": [problem for check in found.audit.checks for problem in check.problems],
        }
        self.save()
        show_questions(self.found["questions"])


SUFFIX = {PRESET: "preset", "Cerebellum, K-quants": "k-quants"}


@dataclass(kw_only=True)
class Rivals:
    """Two other ways to spend the same bytes; what they rest on is measured once for all sizes."""

    bench: rivals.Bench
    workspace: Workspace
    _errors: rivals.Errors | None = None
    _damages: list[dict[str, float]] | None = None

    def mse(self, n_bytes: int) -> rivals.Types:
        """Returns the type of every tensor by the least squared error weighted by the importance matrix."""
        if self._errors is None:
            self._errors = rivals.mse_errors(self.bench, rivals.ALL_TYPES)
        return rivals.mse_types(self.bench, n_bytes, self._errors)

    def bands(self, n_bytes: int) -> rivals.Types:
        """Returns one type for each quarter of the depth, by measured damage."""
        assert self._damages is not None, "measure() comes first"
        return rivals.band_types(self.bench, n_bytes, self._damages)

    def measure(self) -> None:
        """Measures each band at each K-quant with all else at the anchor; IQ types follow by their rounding errors.

        That is how our own curves come by types that nobody measured.
        """
        workspace = self.workspace
        layout = workspace.layout
        curves = open_run(workspace.folder).curves()
        order = chunk_order(workspace.selection.n_chunks, workspace.settings.seed)[: rivals.BAND_CHUNKS]
        anchored = layout.anchored(curves.rounding.anchor)
        self._damages = []
        with measuring(workspace, workspace.source_variant, order) as measurer:
            for band in rivals.depth_bands(self.bench):
                groups = [name for name, group in layout.groups.items() if set(group.tensors) <= set(band)]
                found = {}
                for qtype in K_LADDER:
                    changes = anchored | {name: qtype for name in groups if layout.legal(name, qtype)}
                    variant = workspace.shards.variant(changes, f"band {len(self._damages)} at {qtype}")
                    found[qtype] = float(measurer.kld_means(variant, order).mean())
                self._damages.append(self._foretold(groups, found))

    def _foretold(self, groups: Sequence[str], measured: Mapping[str, float]) -> dict[str, float]:
        """Adds IQ types: the damage of the K-quant of the nearest rounding error, in proportion to the errors."""
        of = open_run(self.workspace.folder).curves().rounding.of
        errors = {
            qtype: sum(of[name].get(qtype, 0.0) for name in groups if name in of)
            for qtype in rivals.ALL_TYPES
        }
        known = {qtype: errors[qtype] for qtype in measured if errors[qtype] > 0}
        damages = dict(measured)
        for qtype, error in errors.items():
            if qtype not in damages and error > 0:
                near = min(known, key=lambda each: abs(np.log(known[each] / error)))
                damages[qtype] = measured[near] * error / known[near]
        return damages


@dataclass(frozen=True, kw_only=True)
class Block:
    """Neighbouring chunks of a text that all files are scored on before the next begin."""

    text: Text
    chunks: range

    @property
    def name(self) -> str:
        """Returns what people are told of it."""
        return f"{self.text.name} {self.chunks.start}-{self.chunks.stop}"


def blocks(texts: Sequence[Text], size: int) -> list[Block]:
    """Returns the blocks of all texts: the first of each, then the second of each, and so on."""
    cut = [
        [
            Block(text=text, chunks=range(start, min(start + size, text.chunks)))
            for start in range(0, text.chunks, size)
        ]
        for text in texts
    ]
    longest = max(len(each) for each in cut)
    return [each[turn] for turn in range(longest) for each in cut if turn < len(each)]


@dataclass(kw_only=True)
class Scores:
    """What each file scored on each chunk, in files of its own, so that nothing is measured twice."""

    folder: Path

    def measure(
        self, engine: Engine, source: Sequence[Path], block: Block, candidates: Sequence[Candidate]
    ) -> None:
        """Scores all files on a block; the source's predictions are kept meanwhile."""
        missing = [each for each in candidates if len(self.of(block.text, each.name)[0]) < block.chunks.stop]
        if not missing:
            return
        corpus = block.text.corpus
        chunks = block.text.order_N[block.chunks.start : block.chunks.stop].tolist()
        kept, nll = reference(engine, source, corpus, chunks)
        self._add(block, SOURCE, nll, np.zeros(len(nll)))
        for candidate in missing:
            path = candidate.path.result()
            if path is not None:
                began = time.monotonic()
                self._add(block, candidate.name, *score(engine, [path], corpus, chunks, kept))
                took = time.monotonic() - began
                print(f"{block.name}: {candidate.name} in {took:.1f} s", file=sys.stderr, flush=True)
        for prediction in kept:
            prediction.close()

    def of(self, text: Text, name: str) -> tuple[Vector, Vector]:
        """Returns (mean NLL, mean KL divergence from the source) of the first chunks, nats a token."""
        path = self.folder / f"{text.name}.{name}.npz"
        if not path.exists():
            return np.zeros(0), np.zeros(0)
        with np.load(path) as known:
            return known["nll"], known["kld"]

    def _add(self, block: Block, name: str, nll: Vector, kld: Vector) -> None:
        known_nll, known_kld = self.of(block.text, name)
        start = block.chunks.start
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{block.text.name}.{name}.npz"
        partial_path = path.with_suffix(".partial.npz")
        both = {"nll": np.append(known_nll[:start], nll), "kld": np.append(known_kld[:start], kld)}
        np.savez(partial_path, **both)
        partial_path.replace(path)

    def common(self, text: Text, names: Sequence[str]) -> int:
        """Returns how many chunks all of these files were scored on."""
        return min((len(self.of(text, name)[0]) for name in (SOURCE, *names)), default=0)

    def vectors(self, texts: Sequence[Text]) -> dict[str, Vector]:
        """Returns all scores, with the documents of the chunks, for whoever wants to work the intervals out anew."""
        found: dict[str, Vector] = {f"{text.name}/documents": text.document_N for text in texts}
        found |= {f"{text.name}/order": text.order_N for text in texts}
        for path in sorted(self.folder.glob("*.npz")):
            text, name = path.stem.split(".", 1)
            with np.load(path) as known:
                found |= {f"{text}/{name}/nll": known["nll"], f"{text}/{name}/kld": known["kld"]}
        return found


def merged(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Returns both, key by key; what is in both is taken from ``now``."""
    both = dict(before)
    for key, value in now.items():
        inner = both.get(key)
        both[key] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return both


def begin_like(like: Path | None, folder: Path) -> None:
    """Begins a run folder with another's shards, importance matrix, second moments and ledger."""
    if like is None or folder.exists():
        return
    shutil.copytree(like / "shards", folder / "shards", copy_function=os.link)
    for path in like.iterdir():
        if path.name.startswith("ledger") or path.name in (IMATRIX, MOMENTS):
            shutil.copy2(path, folder / path.name)


def results(folder: Path) -> list[tuple[Path, BudgetPlan]]:
    """Returns every finished file of a run with its plan; none where there is no finished run."""
    if not (folder / "manifest.json").exists():
        return []
    run = open_run(folder)
    plans = [view.plan() for view in run.results()]
    return [(folder / named.file, plan) for named, plan in zip(run.manifest().results, plans, strict=True)]


def made(candidate: Candidate) -> bool:
    """Says whether a file is there."""
    return candidate.path.done() and candidate.path.result() is not None


def described(text: Text) -> dict[str, Any]:
    """Returns what names a text: its bytes and how many documents it has."""
    digest = sha256(text.corpus.path.read_bytes()).hexdigest()
    return {
        "file": text.corpus.path.name,
        "sha256": digest,
        "chunks": text.corpus.n_chunks,
        "documents": len(np.unique(text.document_N)),
    }


def judged(
    text: Text, n: int, candidates: Sequence[Candidate], scores: Scores, source_file: Path
) -> list[dict[str, Any]]:
    """Returns a row for every file of a size, compared with its preset by document."""
    preset = next(each for each in candidates if each.maker == PRESET)
    documents = text.document_N[:n].tolist()
    source = scores.of(text, SOURCE)[0][:n]
    preset_nll, preset_kld = (vector[:n] for vector in scores.of(text, preset.name))
    rows = []
    for candidate in candidates:
        nll, kld = (vector[:n] for vector in scores.of(text, candidate.name))
        less = less_than_reference(kld, preset_kld, documents)
        loss = mean_by_cluster(nll - preset_nll, documents)
        path = candidate.path.result()
        assert path is not None
        rows.append(
            {
                "maker": candidate.maker,
                "bytes": path.stat().st_size,
                "bytes_finer_than_source": wasted(path, source_file),
                "chunks": n,
                "documents": less.n,
                "loss_nats": float((nll - source).mean()),
                "kld_nats": float(kld.mean()),
                "less_kld_pct": bounds(less),
                "loss_change_nats": bounds(loss),
            }
        )
    return rows


def wasted(path: Path, source: Path) -> int:
    """Returns the bytes spent on types finer than a quantized source has, where a copy would have lost nothing."""
    had = open_source(source, allow_requantize=True).tensors
    kept = open_source(path, allow_requantize=True).tensors
    more = [
        tensor_bytes(kept[name].type, tensor.shape) - tensor_bytes(tensor.type, tensor.shape)
        for name, tensor in had.items()
    ]
    return sum(n_bytes for n_bytes in more if n_bytes > 0)


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table("file", "bytes", "loss, nats", "against the preset", "KL, nats", "less KL", title=title)
    for row in rows:
        mean, low, high = row["loss_change_nats"]
        less, least, most = row["less_kld_pct"]
        first = row["maker"] == PRESET
        reached = " reached" if row["maker"] == OURS and least > 0 and less >= ASKED_PCT else ""
        missed = " missed" if row["maker"] == OURS and not reached else ""
        table.add_row(
            row["maker"],
            f"{row['bytes']:,}",
            f"{row['loss_nats']:.5f}",
            "" if first else f"{mean:+.5f} [{low:+.5f}, {high:+.5f}]",
            f"{row['kld_nats']:.5f}",
            "" if first else f"{less:.1f}% [{least:.1f}, {most:.1f}]{reached}{missed}",
        )
    Console(width=130).print(table)


def show_questions(found: Mapping[str, Any]) -> None:
    table = Table("against", "benchmark", "metric", "difference", "p", "Holm", "could show")
    for row in found["paired"]:
        low, high = row["ci_pct"]
        table.add_row(
            found["models"].get(row["against"], row["against"]),
            f"{row['task']} ({row['protocol']}, {row['labels']}), {row['n']}",
            row["metric"],
            f"{row['difference_pct']:+.1f} [{low:+.1f}, {high:+.1f}]",
            f"{row['p_value']:.3g}",
            "significant" if row["significant_by_holm"] else "",
            f"±{row['detectable_pct']:.1f}",
        )
    Console(width=130).print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--folder", type=Path, required=True, help="for runs, files and scores; some GB")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"by comma, of {', '.join(PARTS)}")
    parser.add_argument("--sizes", default=",".join(SIZES), type=lambda text: tuple(text.split(",")))
    parser.add_argument(
        "--select-text", action="append", help="NAME=FILE or domains [default: prose and code]"
    )
    parser.add_argument("--chunks", type=int, default=0, help="of each report text, 0: all")
    parser.add_argument("--block", type=int, default=192, help="chunks whose predictions are kept at once")
    parser.add_argument("--minutes", type=float, default=12.0, help="no block begins that would end after it")
    parser.add_argument("--imatrix-chunks", type=int, default=200)
    parser.add_argument(
        "--threshold-chunks", type=int, default=150, help="at most, of any group at the limit"
    )
    parser.add_argument("--questions", type=int, default=1000, help="of each benchmark, 0: all")
    parser.add_argument("--data", type=Path, help="folder of the questions [default: CEREBELLUM_DATA]")
    parser.add_argument("--rivals", action="store_true", help="two other ways to choose types, too")
    parser.add_argument("--gpu-layers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--name", default="real", help="of the JSON in results/")
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    asked.folder.mkdir(parents=True, exist_ok=True)
    real = Real(asked=asked)
    real.found |= {
        "model": asked.model.name,
        "source_types": sorted({t.type.name for t in open_source(asked.model, True).tensors.values()}),
        "build": build_id(),
        "devices": [f"{device.name}: {device.description}" for device in devices()],
    }
    for part in asked.parts.split(","):
        if part not in PARTS:
            sys.exit(f"--parts {part}: there are {', '.join(PARTS)}")
        began = real.minutes
        getattr(real, part)()
        real.found.setdefault("minutes", {})[part] = real.minutes - began
        print(f"{part}: {real.minutes - began:.1f} minutes", flush=True)
        real.save()


if __name__ == "__main__":
    main()
