"""Which text should decide: one prose text, or texts of several domains?

    python benchmarks/domains.py --name domains-model --folder DIR MODEL

For each text that could be the default, one `cerebellum run --budget` plans a file of every size; the importance
matrix and second moments are of the same text, as they are in anybody's run. With --cross a third plan is chosen on the
domains with the matrix of the prose, which says how much of a difference the matrix made. The presets of the same
sizes, with either matrix, stand beside them. Every file is then scored on the half of every domain's text that
reports, which had no part in any choice: loss above the source and KL divergence from it, paired by chunk with the
plan that the prose chose. Intervals are over chunks, 95%, for text like the one read; the mean over domains counts each
domain alike.

A folder that is kept goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from common import RESULTS, Vector, cerebellum, reference, save, score

from cerebellum.llama.native import EngineSettings, LlamaEngine
from cerebellum.settings import DEMO_MODEL, SELECTION_TEXT, shipped_domains
from cerebellum.source import open_source
from cerebellum.stats.paired import Interval, superpopulation_interval
from cerebellum.stats.strata import StrataMean, like_these
from cerebellum.texts import load_corpus

PROSE = "plan, prose"
DOMAINS = "plan, domains"
CROSSED = "plan, domains, matrix of prose"
ONE_SIDE = 0.025
EVERY = "every domain alike"


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A file on one domain: mean NLL and mean KL divergence from the source of each chunk, nats a token, (chunks,)."""

    nll: Vector
    kld: Vector


@dataclass(frozen=True, kw_only=True)
class Change:
    """A paired change from the plan chosen on prose, nats a token, with its 95% interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, interval: Interval) -> Change:
        """Returns the change that an interval is of."""
        return cls(mean=interval.mean, low=interval.low, high=interval.high)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A file of one size on one domain, or on every one alike; loss is above the source, nats a token."""

    size: str
    file: str
    bytes: int
    domain: str
    chunks: int
    loss: float
    kld: float
    loss_change: Change
    kld_change: Change
    kld_change_pct: float


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path, nargs="?", default=DEMO_MODEL)
    parser.add_argument("--budgets", nargs="+", default=["Q3_K_M", "Q2_K"], help="presets, for their sizes")
    parser.add_argument("--cross", action="store_true", help="the third plan too")
    parser.add_argument("--imatrix-chunks", type=int, default=120)
    parser.add_argument("--chunks", type=int, default=0, help="of every domain; 0: all of its report half")
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--gpu-layers", type=int, default=0)
    parser.add_argument("--more", default="", help="further options of `cerebellum run`, in one word")
    parser.add_argument("--folder", type=Path, help="where runs and files go [default: a temporary one]")
    parser.add_argument("--name", default="domains", help="of the JSON and the Markdown in results/")
    return parser.parse_args()


def ways(asked: argparse.Namespace) -> dict[str, list[str | Path]]:
    """Returns what each way to choose a plan says to `cerebellum run`."""
    found: dict[str, list[str | Path]] = {
        PROSE: ["--select-text", SELECTION_TEXT],
        DOMAINS: ["--select-text", "domains"],
    }
    if asked.cross:
        found[CROSSED] = ["--select-text", "domains", "--imatrix-text", SELECTION_TEXT]
    return found


def plans(asked: argparse.Namespace, folder: Path, flags: Sequence[str | Path]) -> dict[str, Path]:
    """Runs one way from nothing, or on from where it was; returns the file of every size."""
    engine = ["--ctx", asked.ctx, "--threads", asked.threads, "--gpu-layers", asked.gpu_layers]
    few = ["--imatrix-chunks", asked.imatrix_chunks, "--report-text", "domains", "--report-chunks", 12]
    options = [*flags, *engine, *few, "--allow-requantize", "--budget", ",".join(asked.budgets)]
    options += shlex.split(asked.more)
    answer, seconds = cerebellum("run", asked.model, "-o", folder, *map(str, options))
    print(f"{folder.name}: {seconds:.0f} s", file=sys.stderr)
    sizes = answer.get("sizes") or [{"file": answer["file"]}]
    return {budget: Path(size["file"]) for budget, size in zip(asked.budgets, sizes, strict=True)}


def preset(asked: argparse.Namespace, run: Path, name: str) -> Path:
    """Makes a preset with the matrix and the moments of a run, unless it is there; returns its file."""
    out = run.parent / f"{run.name}-{name}.gguf"
    if not out.exists():
        made = ["--imatrix", run / "imatrix.gguf", "--moments", run / "moments.gguf"]
        rest = ["--threads", asked.threads, "--allow-requantize"]
        cerebellum("quantize", asked.model, name, "-o", out, *map(str, [*made, *rest]))
    return out


def files(asked: argparse.Namespace, folder: Path) -> dict[str, dict[str, Path]]:
    """Makes every file, by size and by what it is called in the table."""
    found: dict[str, dict[str, Path]] = {budget: {} for budget in asked.budgets}
    for way, flags in ways(asked).items():
        run = folder / way.replace(", ", "-").replace(" ", "-")
        for budget, path in plans(asked, run, flags).items():
            found[budget][way] = path
            if way != CROSSED:
                found[budget][way.replace("plan", "preset")] = preset(asked, run, budget)
    return found


def scored(
    asked: argparse.Namespace, paths: Mapping[tuple[str, str], Path]
) -> Iterator[tuple[str, Vector, dict[tuple[str, str], Seen]]]:
    """Yields every domain with the source's NLL and all files on it; predictions of one domain are held at a time."""
    engine = LlamaEngine(EngineSettings(threads=asked.threads, gpu_layers=asked.gpu_layers))
    source = open_source(asked.model, allow_requantize=True)
    for text in shipped_domains("report"):
        corpus = load_corpus(engine, source.path, text.path, asked.ctx)
        chunks = range(min(asked.chunks or corpus.n_chunks, corpus.n_chunks))
        predictions, nll_source = reference(engine, source.paths, corpus, chunks)
        seen = {}
        for key, path in paths.items():
            nll, kld = score(engine, [path], corpus, chunks, predictions)
            seen[key] = Seen(nll=nll, kld=kld)
            print(f"{text.name}, {' '.join(key)}: KL {kld.mean():.5f} nats", file=sys.stderr)
        for prediction in predictions:
            prediction.close()
        yield text.name, nll_source, seen


def on_domain(domain: str, source: Vector, seen: Seen, prose: Seen, key: tuple[str, str], path: Path) -> Row:
    """Compares a file with the plan of its size that the prose chose, on one domain."""
    kld_change = superpopulation_interval(seen.kld - prose.kld)
    return Row(
        size=key[0],
        file=key[1],
        bytes=path.stat().st_size,
        domain=domain,
        chunks=len(seen.kld),
        loss=float((seen.nll - source).mean()),
        kld=float(seen.kld.mean()),
        loss_change=Change.of(superpopulation_interval(seen.nll - prose.nll)),
        kld_change=Change.of(kld_change),
        kld_change_pct=100 * kld_change.mean / float(prose.kld.mean()),
    )


def over_all(rows: Sequence[Row], found: Sequence[tuple[Seen, Seen]]) -> Row:
    """Returns the mean of a file's rows, each domain counting alike, with stratified intervals."""
    loss = StrataMean.of([like_these(seen.nll - prose.nll) for seen, prose in found]).interval(ONE_SIDE)
    kld = StrataMean.of([like_these(seen.kld - prose.kld) for seen, prose in found]).interval(ONE_SIDE)
    return Row(
        size=rows[0].size,
        file=rows[0].file,
        bytes=rows[0].bytes,
        domain=EVERY,
        chunks=sum(row.chunks for row in rows),
        loss=float(np.mean([row.loss for row in rows])),
        kld=float(np.mean([row.kld for row in rows])),
        loss_change=Change.of(loss),
        kld_change=Change.of(kld),
        kld_change_pct=100 * kld.mean / float(np.mean([prose.kld.mean() for _, prose in found])),
    )


def judged(asked: argparse.Namespace, folder: Path) -> list[Row]:
    """Makes all files, scores them on every domain, and returns the rows of the table."""
    made = files(asked, folder)
    paths = {(budget, name): path for budget, own in made.items() for name, path in own.items()}
    rows: dict[tuple[str, str], list[Row]] = {key: [] for key in paths}
    pairs: dict[tuple[str, str], list[tuple[Seen, Seen]]] = {key: [] for key in paths}
    for domain, source, seen in scored(asked, paths):
        for key, path in paths.items():
            prose = seen[key[0], PROSE]
            rows[key].append(on_domain(domain, source, seen[key], prose, key, path))
            pairs[key].append((seen[key], prose))
    return [row for key in paths for row in (*rows[key], over_all(rows[key], pairs[key]))]


def table(rows: Sequence[Row]) -> str:
    """Returns the rows as Markdown, a table for each size."""
    lines = []
    for size in dict.fromkeys(row.size for row in rows):
        lines += [f"**{size}'s size**", "", "| domain, chunks | file | loss | KL | KL against prose's plan |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        for row in sorted(
            (row for row in rows if row.size == size), key=lambda row: (row.domain == EVERY, row.domain)
        ):
            change = "" if row.file == PROSE else f"{row.kld_change_pct:+.1f}%, {written(row.kld_change)}"
            lines.append(
                f"| {row.domain}, {row.chunks} | {row.file} | {row.loss:.5f} | {row.kld:.5f} | {change} |"
            )
        lines.append("")
    return "\n".join(lines)


def written(change: Change) -> str:
    return f"{change.mean:+.5f} [{change.low:+.5f}, {change.high:+.5f}]"


def main() -> None:
    asked = arguments()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = judged(asked, folder)
    found = {"model": asked.model.name, "arguments": sys.argv[1:], "rows": [asdict(row) for row in rows]}
    print(table(rows))
    (RESULTS / f"{asked.name}.md").write_text(table(rows))
    print(save(asked.name, found), file=sys.stderr)


if __name__ == "__main__":
    main()
