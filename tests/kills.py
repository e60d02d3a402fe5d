"""Kills whole runs of the embedded model at random moments and resumes them: python -m tests.kills --n 200

Each chain of kills goes on until its run ends; then its GGUF must be an undisturbed run's byte for byte, and its
ledger must hold the same rows. After each kill, every row that was there before must be there unchanged.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parent))

from tiny import ledger_rows

from cerebellum.settings import DEMO_MODEL

_SMALL = ("--imatrix-chunks", "4", "--report-chunks", "4", "--threads", "1", "--keep-shards")
_GOALS = {
    "limit": ("--max-increase", "3%", "--max-chunks", "6"),
    "budget": ("--budget", "Q3_K_M", "--types", "Q2_K,Q4_K", "--no-fine-types"),
}
_FIRST = 2.0  # seconds before which a run has hardly begun


def command(goal: str, out: Path) -> list[str]:
    """Returns the command line of one small run."""
    run = [sys.executable, "-m", "cerebellum", "run", str(DEMO_MODEL), "-o", str(out)]
    return [*run, *_SMALL, *_GOALS[goal]]


def killed(goal: str, out: Path, seconds: float) -> bool:
    """Runs for so many seconds at most; says whether it had to be killed."""
    process = subprocess.Popen(command(goal, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    assert code == 0, f"{goal}: ended with {code}"
    return False


def rows_of(out: Path) -> dict[object, bytes]:
    """Returns what the ledger of a run holds, if it has one yet."""
    return dict(ledger_rows(out)) if (out / "ledger.sqlite").exists() else {}


def chain(goal: str, out: Path, whole: Path, seconds: float, rng: Random, most: int) -> int:
    """Kills and resumes one run until it ends by itself; returns how often it was killed."""
    n_kills = 0
    before: dict[object, bytes] = {}
    while n_kills < most and killed(goal, out, rng.uniform(_FIRST, seconds)):
        n_kills += 1
        rows = rows_of(out)
        assert {key: rows.get(key) for key in before} == before, f"{goal}: a kill took what was measured"
        before = rows
    if n_kills == most:
        assert not killed(goal, out, 10_000)
    assert rows_of(out) == rows_of(whole), f"{goal}: the ledgers differ"
    (made,) = out.glob("*-Cerebellum-*.gguf")
    assert made.read_bytes() == (whole / made.name).read_bytes(), f"{goal}: the files differ"
    assert not list(out.rglob("*.partial")), f"{goal}: a half-written file was left"
    return n_kills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--n", type=int, default=200, help="kills, shared by both goals")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    rng = Random(asked.seed)
    n_kills: Counter[str] = Counter()
    n_runs: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for goal in _GOALS:
            started = time.monotonic()
            assert not killed(goal, folder / goal, 10_000)
            seconds = max(time.monotonic() - started, 2 * _FIRST)
            while n_kills[goal] < asked.n // len(_GOALS):
                out = folder / f"{goal}-{n_runs[goal]}"
                most = asked.n // len(_GOALS) - n_kills[goal]
                n_kills[goal] += chain(goal, out, folder / goal, seconds, rng, most)
                n_runs[goal] += 1
                print(f"{goal}: {n_kills[goal]} kills of {n_runs[goal]} runs", file=sys.stderr, flush=True)
    print(json.dumps({"kills": n_kills, "runs": n_runs, "lost": 0, "seed": asked.seed}))


if __name__ == "__main__":
    main()
