"""Lets every step of small runs fail in every way, and resumes each: python -m tests.faults --jobs 32

A step is whatever goes through `files.DISK`: files, folders, links, commits and programs that are started. After each
failure the same thing is done again and must end as if nothing had been: the same bytes, nothing measured twice,
nothing left over. `--sample 20` takes so many steps of each kind of failure; `--slice 2/5` the second of five pieces.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent))

from faulty_disk import CRASH, CTRL_C, FAULTS, Crashed, FaultyDisk
from test_checkpoint import CONVERTER, checkpoint_files, write
from test_fake_run import damage
from tiny import Recorder, ledger_rows, small_text, write_hybrid

from cerebellum import files, hub
from cerebellum.bench.chat import Renderer
from cerebellum.encode import library
from cerebellum.engine.fake import FakeEngine
from cerebellum.errors import CerebellumError
from cerebellum.llama import guard
from cerebellum.progress import Silent
from cerebellum.run import run_all
from cerebellum.settings import Budget, EncoderName, Goal, Limit, Preset, Settings
from cerebellum.source.convert import model_file
from cerebellum.source.converter import Chosen
from cerebellum.workspace import Workspace

CTX, CHUNKS = 32, 5
OTHERS = (
    "importance matrix",
    "second moments",
    "reading the source",
    "hashing the source",
    "rounding errors",
)
BY_LIMIT = Limit(max_increase_pct=50.0, chunks=2)
FOR_BUDGET = Budget(sizes=(Preset(name="Q3_K_M"),), types=("Q2_K", "Q4_K"), fine_types=False, zoom=False)


class Case:
    """Something that writes to a folder and can be done again; each time is a process of its own, as it were."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.whole = folder / "whole"
        self.prepare()
        self.steps = self.run(self.whole, FaultyDisk()).steps

    def prepare(self) -> None:
        """Writes the inputs."""

    def run(self, out: Path, disk: FaultyDisk) -> FaultyDisk:
        """Does it on a disk, which is returned."""
        real = files.DISK
        files.DISK = disk
        try:
            self.act(out)
        finally:
            files.DISK = real
        return disk

    def act(self, out: Path) -> None:
        """Does it once."""
        raise NotImplementedError

    def before_resuming(self, out: Path) -> None:
        """Looks at what the failure left."""

    def compare(self, out: Path) -> None:
        """Raises AssertionError where it ended otherwise than the undisturbed one."""
        raise NotImplementedError


class Run(Case):
    """A whole run on the fake engine, its first opening a program of its own.

    Cards take seconds each and write with the same function; a card that fails has a test of its own.
    """

    goal: Goal
    encoder: EncoderName

    def prepare(self) -> None:
        texts = [self.folder / "select.txt", self.folder / "report.txt"]
        for seed, text in enumerate(texts):
            text.write_bytes(small_text(CHUNKS * CTX, seed))
        self.settings = Settings(
            source=write_hybrid(self.folder / "hybrid.F16.gguf"),
            goal=self.goal,
            select_text=texts[0],
            report_text=texts[1],
            ctx=CTX,
            threads=1,
            encoder=self.encoder,
        )

    def act(self, out: Path) -> None:
        self.recorder = Recorder()
        engine = FakeEngine(damage=damage)
        with opened_by(["true"]), without_card():
            run_all(Workspace(out, self.settings, engine, self.recorder, admit=_first_opening))

    def before_resuming(self, out: Path) -> None:
        self.known = ledger_rows(out)

    def compare(self, out: Path) -> None:
        after, wanted = ledger_rows(out), ledger_rows(self.whole)
        assert {key: after[key] for key in self.known} == self.known, "a measurement was changed"
        assert after == wanted, "other measurements"
        measured = sum(total for title, total in self.recorder.tasks if not title.startswith(OTHERS))
        assert measured <= len(wanted) - len(self.known), "something was measured twice"
        (made,) = out.glob("*-Cerebellum-*.gguf")
        assert made.read_bytes() == (self.whole / made.name).read_bytes(), "another file"
        assert (out / "plan.json").read_bytes() == (self.whole / "plan.json").read_bytes(), "another plan"
        assert left_over(out) == [], f"left over: {left_over(out)}"


class ByLimit(Run):
    goal = BY_LIMIT
    encoder = "ggml"


class ForBudget(Run):
    goal = FOR_BUDGET
    encoder = "ours"


class Conversion(Case):
    """A checkpoint that a converter, a program of its own, makes a GGUF of."""

    def prepare(self) -> None:
        write(self.folder / "llama.cpp", {"convert_hf_to_gguf.py": CONVERTER.encode()})
        write(self.folder / "Some Model", checkpoint_files())

    def act(self, out: Path) -> None:
        chosen = Chosen(converter=self.folder / "llama.cpp")
        asked = str(self.folder / "Some Model")
        with patch.object(hub.constants, "HF_HOME", str(out)), patch.dict(os.environ, RUNS=os.devnull):
            self.made = model_file(asked, chosen, out / "run", Silent())

    def compare(self, out: Path) -> None:
        name = self.made.relative_to(out)
        assert self.made.read_bytes() == (self.whole / name).read_bytes(), "another file"
        names = {path.name for path in self.made.parents[1].rglob("*") if not path.name.endswith(".lock")}
        wanted = {path.name for path in (self.whole / name).parents[1].rglob("*")}
        assert names <= wanted, f"left over: {names - wanted}"


class Compilation(Case):
    """The encoder, compiled into a cache."""

    def act(self, out: Path) -> None:
        with patch.dict(os.environ, XDG_CACHE_HOME=str(out)):
            found = library.attempt.__wrapped__()
        assert not isinstance(found, library.Unavailable), f"ggml's encoder would have been taken: {found}"

    def compare(self, out: Path) -> None:
        (made,) = (out / "cerebellum").iterdir()
        (wanted,) = (self.whole / "cerebellum").iterdir()
        assert made.name == wanted.name, "another name"


class Chat(Case):
    """A prompt, rendered by a program of its own."""

    def act(self, out: Path) -> None:
        renderer = Renderer()
        try:
            self.text = renderer.render("{{ x }}", {"x": "prompt"})
        finally:
            renderer.close()

    def compare(self, out: Path) -> None:
        assert self.text == "prompt"


CASES: dict[str, type[Case]] = {
    "limit": ByLimit,
    "budget": ForBudget,
    "conversion": Conversion,
    "encoder": Compilation,
    "chat": Chat,
}


@contextmanager
def opened_by(command: list[str]) -> Iterator[None]:
    """Lets another program stand for the one that opens a model first."""

    def run(*_: object) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(command, stderr=subprocess.PIPE)

    with patch.object(guard, "_opened_by", run):
        yield


@contextmanager
def without_card() -> Iterator[None]:
    run = sys.modules["cerebellum.run"]
    with patch.object(run, "rehearse", lambda _: None), patch.object(run, "card_if_possible", lambda _: None):
        yield


def _first_opening(source: object) -> None:
    guard.try_opening(source.path, source.n_bytes)  # type: ignore[attr-defined]


def left_over(out: Path) -> list[str]:
    found = (p for p in out.rglob("*") if p.name.endswith(".partial") or p.parent.name == "predictions")
    return sorted(path.name for path in found)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one failure came to. ``ended`` tells how the first attempt did; ``problem`` what was wrong, if anything."""

    case: str
    fault: str
    at: int
    step: str
    ended: str
    problem: str | None


def attempt(case: Case, name: str, at: int, fault: str, out: Path) -> Outcome:
    """Fails at one step, does it again, and compares all that it leaves with the undisturbed one."""
    disk = FaultyDisk(at, fault)
    problem = None
    try:
        case.run(out, disk)
        ended = "went on"  # interrupted and taken again, or nothing that the result needs
    except CerebellumError as error:
        ended = "one line"
        if len(str(error).splitlines()) != 1:
            problem = f"not one line: {error}"
    except (KeyboardInterrupt, Crashed):
        ended = "stopped"
        if fault not in (CTRL_C, CRASH):
            problem = f"stopped by {fault}"
    except BaseException as error:
        ended = "traceback"
        problem = f"{type(error).__name__}: {error} is no line for people"
    try:
        case.before_resuming(out)
        case.run(out, FaultyDisk())
        case.compare(out)
    except (AssertionError, CerebellumError, OSError, KeyError, ValueError) as error:
        problem = problem or f"{type(error).__name__}: {error}"
    step = disk.steps[at] if at < len(disk.steps) else "not reached"
    return Outcome(case=name, fault=fault, at=at, step=step, ended=ended, problem=problem)


# ---- as a program, on many cores ----

Job = tuple[str, int, str]
_made: dict[str, Case] = {}
_folder: list[tempfile.TemporaryDirectory[str]] = []


def case_of(name: str) -> Case:
    """Returns the case with its undisturbed run, which each process makes once."""
    if not _folder:
        _folder.append(tempfile.TemporaryDirectory())
    if name not in _made:
        _made[name] = CASES[name](Path(_folder[0].name) / name)
    return _made[name]


def work(job: Job) -> Outcome:
    name, at, fault = job
    case = case_of(name)
    with tempfile.TemporaryDirectory(dir=case.folder) as scratch:
        return attempt(case, name, at, fault, Path(scratch) / "out")


def jobs_of(steps: dict[str, int], sample: int | None, seed: int) -> list[Job]:
    """Lists every step in every way, or a sample of so many of each kind, in an order that mixes short and long."""
    rng = Random(seed)
    found: list[Job] = []
    for name, n_steps in steps.items():
        for fault in FAULTS:
            numbers = range(n_steps)
            chosen = numbers if sample is None else rng.sample(numbers, min(sample, n_steps))
            found += [(name, at, fault) for at in chosen]
    rng.shuffle(found)
    return found


def told(steps: dict[str, Counter[str]], found: Iterable[Outcome], seconds: float) -> dict[str, object]:
    """Returns the figures by case and kind of failure, and every failure to resume."""
    outcomes = list(found)
    kinds = []
    for name in steps:
        for fault in FAULTS:
            of_kind = [one for one in outcomes if one.case == name and one.fault == fault]
            kinds.append(
                {
                    "case": name,
                    "fault": fault,
                    "steps": steps[name].total(),
                    "tried": len(of_kind),
                    "first": dict(Counter(one.ended for one in of_kind)),
                    "ended_the_same": sum(one.problem is None for one in of_kind),
                    "failures": sum(one.problem is not None for one in of_kind),
                }
            )
    return {
        "steps": {name: dict(counted) for name, counted in steps.items()},
        "kinds": kinds,
        "tried": len(outcomes),
        "ended_the_same": sum(one.problem is None for one in outcomes),
        "failures": [asdict(one) for one in outcomes if one.problem is not None],
        "seconds": round(seconds, 1),
    }


def main() -> int:
    """Exit code 1 where anything did not end as it should."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--sample", type=int, help="steps of each case and kind of failure; all without it")
    parser.add_argument("--slice", default="1/1", help="I/N: the I-th of N pieces")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    asked = parser.parse_args()
    piece, pieces = map(int, asked.slice.split("/"))
    started = time.monotonic()
    names = asked.cases.split(",")
    steps = {name: Counter(case_of(name).steps) for name in names}
    jobs = jobs_of({name: counted.total() for name, counted in steps.items()}, asked.sample, asked.seed)
    jobs = jobs[piece - 1 :: pieces]
    found: list[Outcome] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(asked.jobs, mp_context=context) as pool:
        for outcome in pool.map(work, jobs, chunksize=4):
            found.append(outcome)
            if outcome.problem:
                print(f"FAILED {outcome}", file=sys.stderr, flush=True)
            if len(found) % 100 == 0:
                print(f"{len(found)} of {len(jobs)}", file=sys.stderr, flush=True)
    figures = told(steps, found, time.monotonic() - started)
    text = json.dumps(figures, indent=1)
    if asked.out:
        asked.out.write_text(text + "\n")
    for kind in figures["kinds"]:  # type: ignore[attr-defined]
        print(*(f"{key}={value}" for key, value in kind.items()))
    print(f"tried {figures['tried']}, ended the same {figures['ended_the_same']}, {figures['seconds']} s")
    return 1 if figures["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
