"""Kills whole runs of the embedded model at random moments and resumes them: python -m tests.kills --n 200 --jobs 16

Each chain of kills goes on until its run ends; then its GGUF must be an undisturbed run's byte for byte, and its
ledger must hold the same rows. After each kill, every row that was there before must be there unchanged. Half of the
chains keep their shards, the others remove them at the end, as runs do unless told otherwise.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from threading import Lock

sys.path.insert(0, str(Path(__file__).parent))

from tiny import ledger_rows

from cerebellum.settings import DEMO_MODEL, SELECTION_TEXT

_GOALS = {
    "limit": ("--max-increase", "3%", "--max-chunks", "6"),
    "budget": ("--budget", "Q3_K_M", "--types", "Q2_K,Q4_K", "--no-fine-types"),
}
_TEXT = "select.txt"
_CHARACTERS = 40_000  # of the selection text, some 100 chunks of 128 tokens
_FIRST = 2.0  # seconds before which a run has hardly begun
_FOR_EVER = 10_000.0


@dataclass(frozen=True, kw_only=True)
class Undisturbed:
    """A run that nobody killed: its folder, and how long it took."""

    folder: Path
    seconds: float


@dataclass(kw_only=True)
class Tally:
    """Kills still to be made for one goal; chains on many threads take from it."""

    left: int
    _lock: Lock = field(default_factory=Lock)

    def take(self) -> bool:
        """Takes one, if there is one left."""
        with self._lock:
            if self.left == 0:
                return False
            self.left -= 1
            return True

    def give_back(self) -> None:
        """Puts back one that came too late, when the run had ended."""
        with self._lock:
            self.left += 1


@dataclass(frozen=True, kw_only=True)
class Chain:
    """One run, killed and resumed until it ended: how often, after how many rows each time, and what was wrong."""

    goal: str
    number: int
    kills: int
    rows_at_kills: tuple[int, ...]
    problem: str | None


def command(goal: str, out: Path, threads: int, keep: bool) -> list[str]:
    """Returns the command line of one small run, on a text that lies beside the folder."""
    text = out.parent / _TEXT
    run = [sys.executable, "-m", "cerebellum", "run", str(DEMO_MODEL), "-o", str(out)]
    small = ["--imatrix-chunks", "4", "--report-chunks", "4", "--threads", str(threads), "--ctx", "128"]
    texts = ["--select-text", str(text), "--report-text", "prose"]
    return [*run, *small, *texts, *(["--keep-shards"] if keep else []), *_GOALS[goal]]


def killed(started: list[str], seconds: float, log: Path) -> bool:
    """Runs for so many seconds at most; says whether it had to be killed."""
    with log.open("ab") as told:
        process = subprocess.Popen(started, stdin=subprocess.DEVNULL, stdout=told, stderr=told)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return True
    assert code == 0, f"ended with {code}: {log.read_text(errors='replace').strip()[-300:]}"
    return False


def rows_of(out: Path) -> dict[object, bytes]:
    """Returns what the ledger of a run holds, if it has one yet."""
    return dict(ledger_rows(out)) if (out / "ledger.sqlite").exists() else {}


def kill_and_resume(
    goal: str, number: int, out: Path, whole: Undisturbed, tally: Tally, rng: Random, threads: int
) -> Chain:
    """Kills and resumes one run until it ends by itself, or no kill is left."""
    counts: list[int] = []
    started = command(goal, out, threads, keep=number % 2 == 0)
    log = out.with_suffix(".log")
    try:
        before: dict[object, bytes] = {}
        while tally.take():
            if not killed(started, rng.uniform(_FIRST, whole.seconds), log):
                tally.give_back()
                break
            rows = rows_of(out)
            counts.append(len(rows))
            assert {key: rows.get(key) for key in before} == before, "a kill took what was measured"
            before = rows
        else:
            assert not killed(started, _FOR_EVER, log)
        assert rows_of(out) == rows_of(whole.folder), "the ledgers differ"
        (made,) = out.glob("*-Cerebellum-*.gguf")
        assert made.read_bytes() == (whole.folder / made.name).read_bytes(), "the files differ"
        assert not list(out.rglob("*.partial")), "a half-written file was left"
        problem = None
    except Exception:
        problem = traceback.format_exc().strip().splitlines()[-1]
    return Chain(goal=goal, number=number, kills=len(counts), rows_at_kills=tuple(counts), problem=problem)


def all_chains(
    folder: Path, n_kills: int, jobs: int, threads: int, seed: int, wholes: Mapping[str, Undisturbed]
) -> list[Chain]:
    """Runs chains of both goals, ``jobs`` at once, until each goal has its half of the kills."""
    found: list[Chain] = []
    tallies = {goal: Tally(left=n_kills // len(_GOALS)) for goal in _GOALS}

    def one_after_the_other(slot: int) -> None:
        number = slot
        goals = list(_GOALS)
        while any(tally.left > 0 for tally in tallies.values()):
            goal = goals[(number // jobs + slot) % len(goals)]
            if tallies[goal].left > 0:
                out = folder / f"{goal}-{number}"
                rng = Random(f"{seed} {goal} {number}")
                found.append(
                    kill_and_resume(goal, number // jobs, out, wholes[goal], tallies[goal], rng, threads)
                )
                print(found[-1], file=sys.stderr, flush=True)
            number += jobs

    with ThreadPoolExecutor(jobs) as pool:
        for done in as_completed([pool.submit(one_after_the_other, slot) for slot in range(jobs)]):
            done.result()
    return found


def undisturbed(folder: Path, threads: int) -> dict[str, Undisturbed]:
    """Runs each goal once without a kill, both at once, so that their times are those of a machine at work."""

    def run(goal: str) -> Undisturbed:
        started = time.monotonic()
        out = folder / goal
        assert not killed(command(goal, out, threads, keep=True), _FOR_EVER, out.with_suffix(".log"))
        return Undisturbed(folder=out, seconds=max(time.monotonic() - started, 2 * _FIRST))

    with ThreadPoolExecutor(len(_GOALS)) as pool:
        return dict(zip(_GOALS, pool.map(run, _GOALS), strict=True))


def told(found: list[Chain], wholes: Mapping[str, Undisturbed], seconds: float) -> dict[str, object]:
    """Returns the figures by goal, and every chain that did not end as it should."""
    goals = {}
    for goal, whole in wholes.items():
        chains = [one for one in found if one.goal == goal]
        goals[goal] = {
            "kills": sum(one.kills for one in chains),
            "runs": len(chains),
            "most_kills_of_a_run": max((one.kills for one in chains), default=0),
            "kills_with_measurements": sum(sum(n > 0 for n in one.rows_at_kills) for one in chains),
            "rows": len(rows_of(whole.folder)),
            "seconds_undisturbed": round(whole.seconds, 1),
            "ended_the_same": sum(one.problem is None for one in chains),
        }
    failures = [f"{one.goal} {one.number}: {one.problem}" for one in found if one.problem]
    kills = sum(one.kills for one in found)
    return {"kills": kills, "goals": goals, "failures": failures, "seconds": round(seconds, 1)}


def main() -> int:
    """Exit code 1 where a run did not end as it should."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--n", type=int, default=200, help="kills, shared by both goals")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each in a folder of its own")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    asked = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / _TEXT).write_text(
            SELECTION_TEXT.read_text(encoding="utf-8")[:_CHARACTERS], encoding="utf-8"
        )
        wholes = undisturbed(Path(scratch), asked.threads)
        found = all_chains(Path(scratch), asked.n, asked.jobs, asked.threads, asked.seed, wholes)
        figures = told(found, wholes, time.monotonic() - began)
    text = json.dumps({"seed": asked.seed, "jobs": asked.jobs, **figures}, indent=1)
    if asked.out:
        asked.out.write_text(text + "\n")
    print(text)
    return 1 if figures["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
