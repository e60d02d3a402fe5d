"""One worker against several of the same machine: the same run, the same plan, and how much faster it measures.

`python benchmarks/workers.py --source model-F16.gguf --workers 2 --budget Q3_K_M` on a machine with two cards, or
with `--max-increase 3%` by limit. On a machine without cards the workers are threads of the processor
(`--worker-threads 1`). Where there are fewer cards than workers they share one, which shows that the answers are the
same and says nothing about speed; the JSON then says `shared_cards`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import save

IGNORED = ("settings.json", "manifest.json")


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A run: seconds of the command, of its measure stage (Ray's start and all else apart), and its chunks."""

    workers: int
    wall_seconds: float
    measure_seconds: float
    setup_seconds: float
    chunks: int
    chunks_a_second: float


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--worker-threads", type=int, help="of each worker, in both runs")
    parser.add_argument("--budget", help="a size or a preset; else the run is by limit")
    parser.add_argument("--max-increase", default="3%")
    parser.add_argument("--select-text", type=Path, help="[default: the prose that comes along]")
    parser.add_argument("--report-chunks", type=int, default=20)
    parser.add_argument("--imatrix-chunks", type=int, default=50)
    parser.add_argument("--imatrix", type=Path, help="one that is there already")
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--max-chunks", type=int, default=0, help="by limit: at most so many a group")
    parser.add_argument("--allow-requantize", action="store_true")
    parser.add_argument("--gpu-layers", default="auto")
    parser.add_argument("--encoder", help="ours or ggml [default: the program's]")
    parser.add_argument("--no-feedback", action="store_true", help="as of `cerebellum run`")
    parser.add_argument(
        "--out", type=Path, help="where the run folders go, and stay [default: a temporary folder]"
    )
    parser.add_argument("--also", default="", help="more options of `cerebellum run`, in one argument")
    parser.add_argument("--no-warm-up", action="store_true", help="the shards are made while it is timed")
    parser.add_argument("--name", default="workers")
    parser.add_argument("--json", action="store_true", help="the result on stdout, and nothing else")
    return parser.parse_args()


def command(asked: argparse.Namespace, folder: Path, workers: int) -> list[str]:
    goal = ["--budget", asked.budget] if asked.budget else ["--max-increase", asked.max_increase]
    if not asked.budget and asked.max_chunks:
        goal += ["--max-chunks", str(asked.max_chunks)]
    options = ["--ctx", asked.ctx, "--gpu-layers", asked.gpu_layers, "--workers", workers]
    if asked.worker_threads:
        options += ["--worker-threads" if workers > 1 else "--threads", asked.worker_threads]
    options += ["--report-chunks", asked.report_chunks]
    options += ["--imatrix", asked.imatrix] if asked.imatrix else ["--imatrix-chunks", asked.imatrix_chunks]
    options += ["--select-text", asked.select_text or "prose", "--report-text", "prose"]
    options += ["--allow-requantize"] if asked.allow_requantize else []
    options += ["--encoder", asked.encoder] if asked.encoder else []
    options += ["--no-feedback"] if asked.no_feedback else []
    options += shlex.split(asked.also)
    whole = [sys.executable, "-m", "cerebellum", "run", asked.source, "-o", folder, *goal, *options]
    return [str(part) for part in [*whole, "--keep-shards", "--timings", "--json"]]


def run(asked: argparse.Namespace, folder: Path, workers: int) -> Timed:
    """One run in a process of its own. Its measure stage is from the first to the last row of its ledger on the text
    that decides, by the clock of this process, which looks four times a second."""
    started = time.perf_counter()
    first = last = 0.0
    count = 0
    env = dict(os.environ)
    if (
        workers == 1
    ):  # one card, also where there are more: llama.cpp would spread the layers over all of them
        env["CUDA_VISIBLE_DEVICES"] = env.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    # A pipe that nobody reads would fill up, and the run would wait for ever.
    folder.parent.mkdir(parents=True, exist_ok=True)
    answer = folder.parent / f"{folder.name}.out"
    with answer.open("w") as out:
        process = subprocess.Popen(command(asked, folder, workers), stdout=out, env=env)
    while process.poll() is None:
        time.sleep(0.1)
        now = chunks_of(folder)
        if now != count:
            first = first or time.perf_counter()
            if not (folder / "plan.json").exists():
                last = time.perf_counter()
                count = now
    wall = time.perf_counter() - started
    if process.returncode not in (0, 1):
        said = answer.read_text()[-2000:]
        sys.exit(f"cerebellum run with {workers} workers ended with {process.returncode}:\n{said}")
    seconds = last - first
    return Timed(
        workers=workers,
        wall_seconds=wall,
        measure_seconds=seconds,
        setup_seconds=first - started,
        chunks=count,
        chunks_a_second=count / seconds if seconds > 0 else 0.0,
    )


def chunks_of(folder: Path) -> int:
    """How many chunks the run's ledger has; 0 while there is none."""
    path = folder / "ledger.sqlite"
    if not path.exists():
        return 0
    try:
        with sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=5) as database:
            return int(database.execute("SELECT count(*) FROM chunk").fetchone()[0])
    except sqlite3.Error:
        return 0


def warmed(asked: argparse.Namespace, folder: Path, finished: Path) -> None:
    """Gives a run the importance matrix and the shards of a finished one, so that measuring alone is compared."""
    folder.mkdir(parents=True)
    for name in ("imatrix.gguf", "moments.gguf", "rounding.json"):
        if (finished / name).exists():
            shutil.copy2(finished / name, folder / name)
    shutil.copytree(finished / "shards", folder / "shards", copy_function=linked)


def linked(source: str, target: str) -> str:
    Path(target).hardlink_to(source)
    return target


def same(one: Path, other: Path) -> dict[str, bool]:
    """Which artifacts of two runs are the same bytes, and the result."""
    names = [path.name for path in one.glob("*.json") if path.name not in IGNORED]
    names += [path.name for path in one.glob("*Cerebellum*.gguf")]
    return {name: (one / name).read_bytes() == (other / name).read_bytes() for name in sorted(names)}


def cards() -> list[str]:
    from cerebellum.llama.library import gpus

    return [device.description for device in gpus()]


def compare(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    found = {}
    if not asked.no_warm_up:
        print("a first run makes importance matrix and shards", file=sys.stderr, flush=True)
        run(asked, folder / "first", 1)
    for workers in (1, asked.workers):
        place = folder / f"{workers}-workers"
        if not asked.no_warm_up:
            warmed(asked, place, folder / "first")
        found[workers] = run(asked, place, workers)
        print(found[workers], file=sys.stderr, flush=True)
    one, many = found[1], found[asked.workers]
    alike = same(folder / "1-workers", folder / f"{asked.workers}-workers")
    plan = json.loads((folder / "1-workers" / "plan.json").read_text())
    return {
        "source": asked.source.name,
        "bytes": asked.source.stat().st_size,
        "goal": ["--budget", asked.budget] if asked.budget else ["--max-increase", asked.max_increase],
        "cards": cards(),
        "shared_cards": 0 < len(cards()) < asked.workers,
        "runs": [asdict(one), asdict(many)],
        "measure_stage_ratio": one.measure_seconds / many.measure_seconds,
        "wall_ratio": one.wall_seconds / many.wall_seconds,
        "chunks_scored_ahead": many.chunks - one.chunks,
        "same_bytes": alike,
        "all_the_same": all(alike.values()),
        "measured_delta_pct": plan["measured_delta_pct"],
    }


def main() -> None:
    asked = arguments()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (asked.out or Path(temporary)).absolute()
        result = compare(asked, folder)
    path = save(asked.name, result)
    if asked.json:
        print(json.dumps(result, indent=2))
        return
    print(f"measure stage: {result['measure_stage_ratio']:.2f} times as fast by {asked.workers} workers")
    print(f"whole command: {result['wall_ratio']:.2f} times; all the same bytes: {result['all_the_same']}")
    print(path)


if __name__ == "__main__":
    main()
