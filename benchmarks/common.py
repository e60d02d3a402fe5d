"""What the benchmarks share: timed commands, provenance, results as JSON beside a table."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cerebellum.engine.protocols import Engine, Job, Kept, Scores
from cerebellum.stats.estimate import Estimate
from cerebellum.stats.paired import Floats, without_nan
from cerebellum.texts import Corpus, read_text

Vector = NDArray[np.float64]

RESULTS = Path(__file__).parent / "results"
ON_PROSE = ("--select-text", "prose", "--report-text", "prose")
"""The texts that published figures are of: the default until texts of six domains became it."""
FINAL = re.compile(r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)")
CHUNKS = re.compile(r"calculating perplexity over (\d+) chunks")


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A command that ended well: what it printed and the seconds it took."""

    output: str
    seconds: float


def timed(command: Sequence[str | Path]) -> Finished:
    """Runs a command; a failure shows its last lines and ends the benchmark."""
    start = time.perf_counter()
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        sys.exit(f"{command[0]} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return Finished(output=done.stdout + done.stderr, seconds=time.perf_counter() - start)


def cerebellum(*arguments: str | Path) -> tuple[dict[str, Any], float]:
    """One `cerebellum ... --json` in a process of its own: its answer and its wall seconds."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "cerebellum", *(str(a) for a in arguments), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"cerebellum {arguments[0]} ended with {done.returncode}")
    return json.loads(done.stdout), time.perf_counter() - start


def stock(name: str, folder: Path | None) -> Path:
    """A stock llama.cpp binary, from ``folder`` or the PATH."""
    found = folder / name if folder else shutil.which(name)
    if not found or not Path(found).exists():
        sys.exit(f"{name} not found: put llama.cpp's binaries on the PATH or name their folder")
    return Path(found)


def stock_perplexity(binary: Path, model: Path, text: Path, ctx: int, threads: int) -> dict[str, float]:
    """llama-perplexity over the whole text: ppl, chunks and seconds.

    Its log is written by another thread and now and then loses its last lines, so it gets three tries;
    only the one that counts is timed.
    """
    for _ in range(3):
        done = timed([binary, "-m", model, "-f", text, "-c", str(ctx), "-t", str(threads)])
        ppl, chunks = FINAL.search(done.output), CHUNKS.search(done.output)
        if ppl and chunks:
            break
    else:
        sys.exit(f"{binary} printed no perplexity:\n{done.output[-2000:]}")
    return {"ppl": float(ppl[1]), "se": float(ppl[2]), "chunks": int(chunks[1]), "seconds": done.seconds}


def reference(
    engine: Engine, paths: Sequence[Path], corpus: Corpus, chunks: Sequence[int]
) -> tuple[list[Kept], Vector]:
    """Returns a model's predictions of some chunks, kept where it runs, and its mean NLL of each, nats a token."""
    jobs = [Job(tokens_T=corpus.inputs(chunk), keep=True) for chunk in chunks]
    predictions: list[Kept] = []
    nll = []
    for scores in scored(engine, paths, corpus.ctx, jobs):
        assert scores.kept is not None
        predictions.append(scores.kept)
        nll.append(scores.nll_S.mean())
    return predictions, np.array(nll)


def score(
    engine: Engine, paths: Sequence[Path], corpus: Corpus, chunks: Sequence[int], kept: Sequence[Kept]
) -> tuple[Vector, Vector]:
    """Returns (mean NLL, mean KL divergence from what was kept) of each chunk, nats a token."""
    jobs = [
        Job(tokens_T=corpus.inputs(chunk), against=prediction)
        for chunk, prediction in zip(chunks, kept, strict=True)
    ]
    nll, kld = [], []
    for scores in scored(engine, paths, corpus.ctx, jobs):
        assert scores.kld_S is not None
        nll.append(scores.nll_S.mean())
        kld.append(scores.kld_S.mean())
    return np.array(nll), np.array(kld)


def scored(engine: Engine, paths: Sequence[Path], ctx: int, jobs: Sequence[Job]) -> Iterator[Scores]:
    """Scores chunks in order, as many at once as the engine decodes together."""
    with engine.resident(paths, ctx) as model:
        for start in range(0, len(jobs), model.chunks_at_once):
            yield from model.score(jobs[start : start + model.chunks_at_once])


_TITLE = re.compile(rb"^(?: = [^=\n].* = ?|# module .*)$", re.MULTILINE)
_WITHOUT_TITLES = 10  # neighbouring chunks that count as one article in a text that names none


def articles(engine: Engine, model: Path, corpus: Corpus) -> list[int]:
    """Returns the number of the article that each chunk of a text is of, for errors by article.

    Articles begin at titles as WikiText has them (`` = Title = ``), or at the modules of code_texts.py. A chunk is of
    the one in which its scored half has its middle. Articles are tokenized one by one, which moves a border by a token
    or two. A text that names no articles is cut into runs of ten chunks.
    """
    found: list[int] = []
    for path, chunks in [(part.path, part.chunks) for part in corpus.parts] or [
        (corpus.path, range(corpus.n_chunks))
    ]:
        text = read_text(path)
        starts = [0, *(title.start() for title in _TITLE.finditer(text) if title.start() > 0), len(text)]
        pieces = [text[start:end] for start, end in pairwise(starts)]
        ends_A = np.cumsum([len(engine.tokenize(model, piece).tokens) for piece in pieces])
        middles_N = (np.arange(len(chunks)) + 0.75) * corpus.ctx
        if len(pieces) < 2:
            ends_A = np.arange(1, len(chunks) + 1) * _WITHOUT_TITLES * corpus.ctx
        first = found[-1] + 1 if found else 0
        found += [first + int(place) for place in np.searchsorted(ends_A, middles_N, side="right")]
    return found


def bounds(estimate: Estimate) -> list[float]:
    """Returns [mean, low, high], the 95% interval, for JSON."""
    found = estimate.interval()
    return [found.mean, found.low, found.high]


def share(mean_low_high: Sequence[float]) -> str:
    """Shows a percentage with its interval."""
    mean, low, high = mean_low_high
    return f"{mean:.1f}% [{low:.1f}, {high:.1f}]"


def save_vectors(name: str, vectors: Mapping[str, Floats]) -> Path:
    """results/<name>.npz, for whoever wants another interval than the one that was told."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.npz"
    np.savez_compressed(path, **{key: np.asarray(vector) for key, vector in vectors.items()})
    return path


def save(name: str, result: dict[str, Any]) -> Path:
    """results/<name>.json, with the machine it was measured on; null where a number is not finite."""
    RESULTS.mkdir(exist_ok=True)
    machine = {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()}
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(without_nan({"machine": machine, **result}), indent=2) + "\n")
    return path
