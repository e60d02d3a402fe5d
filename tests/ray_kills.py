"""Kills workers and drivers of runs through Ray at random moments: python -m tests.ray_kills --n 20

Runs of the embedded model on short texts, on the processor, for both goals: the driver is killed in one half of the
kills, and a worker in the other. Each chain of kills goes on until its run ends; then its plan and its GGUF must be
those of an undisturbed run by one process, byte for byte, and its ledger must hold the same rows; it may hold more,
which were scored ahead. After each kill, every row that was there before must be there unchanged.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parent))

from tiny import ledger_rows, ray_workers_of

from cerebellum.settings import DEMO_MODEL, REPORT_TEXT, SELECTION_TEXT

_SMALL = ("--imatrix-chunks", "4", "--report-chunks", "8", "--gpu-layers", "0", "--ctx", "128")
_ALONE = ("--threads", "1")
_GOALS = {
    "limit": ("--max-increase", "3%", "--max-chunks", "6"),
    "budget": ("--budget", "Q3_K_M", "--types", "Q2_K,Q4_K", "--no-fine-types"),
}
_RAY_STARTS = 6.0  # seconds
_FIRST = 2.0  # seconds before which a run has hardly begun
_TEXT_BYTES = 60_000  # of each shipped text
_SETTLED = 0.2  # seconds between two looks for workers


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Runs of one goal in one folder, the ``whole`` run that they have to equal, and how they are made."""

    goal: str
    out: Path
    whole: Path
    workers: int
    rng: Random

    def begun(self) -> subprocess.Popen[bytes]:
        """Starts the command; what it says goes to a file beside its folder."""
        many = ("--workers", str(self.workers), "--worker-threads", "1") if self.workers > 1 else ()
        run = [sys.executable, "-m", "cerebellum", "run", str(DEMO_MODEL), "-o", str(self.out)]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [*run, *self.texts(), *_SMALL, *_GOALS[self.goal], *_ALONE, *many],
                stdout=subprocess.DEVNULL,
                stderr=log,
            )

    def texts(self) -> list[str]:
        """Returns the options that name short beginnings of the texts that come along, which are made here."""
        options = []
        for flag, text in (("--select-text", SELECTION_TEXT), ("--report-text", REPORT_TEXT)):
            short = self.out.parent / text.name
            if not short.exists():
                short.write_bytes(text.read_bytes()[:_TEXT_BYTES])
            options += [flag, str(short)]
        return options

    @property
    def log(self) -> Path:
        return self.out.with_suffix(".log")

    def ended(self, code: int) -> None:
        """Refuses a run that did not end well, with the last that it said."""
        assert code == 0, f"{self.goal}: ended with {code}: {self.log.read_text()[-2000:]}"

    def driver_killed(self, seconds: float) -> bool:
        """Runs for so many seconds at most; says whether it had to be killed."""
        process = self.begun()
        try:
            self.ended(process.wait(seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return True
        return False

    def kill_drivers(self, seconds: float, most: int) -> int:
        """Kills and resumes the run until it ends by itself; returns how often it was killed."""
        n_kills = 0
        before: dict[object, bytes] = {}
        while n_kills < most and self.driver_killed(self.rng.uniform(_FIRST, seconds)):
            n_kills += 1
            before = self.kept(before)
        if n_kills == most:
            assert not self.driver_killed(10_000)
        return n_kills

    def kill_workers(self, most: int) -> int:
        """Kills workers of one run, each once all are there again and some time has passed."""
        process = self.begun()
        n_kills = 0
        before: dict[object, bytes] = {}
        while process.poll() is None:
            living = sorted(ray_workers_of(process.pid))
            if n_kills == most or len(living) < self.workers or not rows_of(self.out):
                time.sleep(_SETTLED)
                continue
            time.sleep(self.rng.uniform(0, 1.0))
            with suppress(ProcessLookupError):  # the run may be at its end
                os.kill(living[0], signal.SIGKILL)  # the oldest, which has something under way
                n_kills += 1
            before = self.kept(before)
            while living[0] in ray_workers_of(process.pid):
                time.sleep(_SETTLED)
        self.ended(process.returncode)
        return n_kills

    def kept(self, before: dict[object, bytes]) -> dict[object, bytes]:
        """Returns the rows that the ledger has, after a look whether all that it had before are among them."""
        rows = rows_of(self.out)
        assert {key: rows.get(key) for key in before} == before, f"{self.goal}: a kill took what was measured"
        return rows

    def check(self) -> None:
        """Compares the run with the whole one."""
        rows = rows_of(self.out)
        wanted = rows_of(self.whole)
        if self.workers > 1:
            rows = {key: rows.get(key) for key in wanted}
        assert rows == wanted, f"{self.goal}: the ledgers differ"
        (made,) = self.out.glob("*-Cerebellum-*.gguf")
        for name in ("plan.json", made.name):
            same = (self.out / name).read_bytes() == (self.whole / name).read_bytes()
            assert same, f"{self.goal}: {name} differs"
        assert not list(self.out.rglob("*.partial")), f"{self.goal}: a half-written file was left"


def rows_of(out: Path) -> dict[object, bytes]:
    """Returns what the ledger of a run holds, if it has one yet."""
    return dict(ledger_rows(out)) if (out / "ledger.sqlite").exists() else {}


def kill(asked: argparse.Namespace, folder: Path, goals: Sequence[str], victim: str) -> dict[str, int]:
    """Kills drivers or workers so often in all, shared by the goals; returns how often for each goal."""
    rng = Random(asked.seed)
    n_kills: Counter[str] = Counter()
    for goal in goals:
        wanted = -(-asked.n // len(goals) // len(asked.victims))
        number = 0
        whole = folder / goal
        seconds = whole_seconds(goal, whole, rng)
        seconds += _RAY_STARTS
        while n_kills[goal] < wanted:
            out = folder / f"{goal}-{victim}-{number}"
            chain = Chain(goal=goal, out=out, whole=whole, workers=asked.workers, rng=rng)
            most = wanted - n_kills[goal]
            worker = victim == "worker"
            n_kills[goal] += chain.kill_workers(most) if worker else chain.kill_drivers(seconds, most)
            chain.check()
            number += 1
            print(f"{goal}, {victim}: {n_kills[goal]} kills of {number} runs", file=sys.stderr, flush=True)
    return dict(n_kills)


def whole_seconds(goal: str, whole: Path, rng: Random) -> float:
    """Makes the undisturbed run, by one process, unless it is there; returns how long it took."""
    took = whole.with_suffix(".seconds")
    if not took.exists():
        started = time.monotonic()
        undisturbed = Chain(goal=goal, out=whole, whole=whole, workers=1, rng=rng)
        assert not undisturbed.driver_killed(10_000)
        took.write_text(str(time.monotonic() - started))
    return max(float(took.read_text()), 2 * _FIRST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--n", type=int, default=20, help="kills, shared by goals and victims")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--victims", nargs="+", choices=("driver", "worker"), default=["driver", "worker"])
    parser.add_argument("--goals", nargs="+", choices=sorted(_GOALS), default=sorted(_GOALS))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        kills = {victim: kill(asked, Path(scratch), asked.goals, victim) for victim in asked.victims}
    print(json.dumps({"kills": kills, "lost": 0, "workers": asked.workers, "seed": asked.seed}))


if __name__ == "__main__":
    main()
