"""Every step that changes the disk fails once, in runs of both goals; the same run again ends as if nothing was."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_disk import FAULTS, Crashed, FaultyDisk
from test_fake_run import damage
from tiny import Recorder, ledger_rows, small_text, write_hybrid

from cerebellum import files
from cerebellum.engine.fake import FakeEngine
from cerebellum.errors import CerebellumError
from cerebellum.run import run_all
from cerebellum.settings import Budget, Goal, Limit, Preset, Settings
from cerebellum.workspace import Workspace

CTX, CHUNKS = 32, 5
GOALS: dict[str, Goal] = {
    "limit": Limit(max_increase_pct=50.0, chunks=2),
    "budget": Budget(sizes=(Preset(name="Q3_K_M"),), types=("Q2_K", "Q4_K"), fine_types=False, zoom=False),
}
OTHERS = ("importance matrix", "hashing the source", "rounding errors")


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Cards take seconds each and write with the same function; a card that fails has a test of its own."""
    monkeypatch.setattr(sys.modules["cerebellum.run"], "rehearse", lambda workspace: None)
    monkeypatch.setattr(sys.modules["cerebellum.run"], "card_if_possible", lambda workspace: None)
    real = files.DISK
    yield
    files.DISK = real


class Case:
    """One goal on one small source; ``run`` is a process of its own, as it were."""

    def __init__(self, folder: Path, goal: Goal) -> None:
        self.folder = folder
        texts = [folder / "select.txt", folder / "report.txt"]
        for seed, text in enumerate(texts):
            text.write_bytes(small_text(CHUNKS * CTX, seed))
        self.settings = Settings(
            source=write_hybrid(folder / "hybrid.F16.gguf"),
            goal=goal,
            select_text=texts[0],
            report_text=texts[1],
            ctx=CTX,
            threads=1,
        )

    def run(self, out: Path, disk: FaultyDisk | None = None) -> tuple[Recorder, FakeEngine]:
        files.DISK = disk or FaultyDisk()
        recorder, engine = Recorder(), FakeEngine(damage=damage)
        run_all(Workspace(out, self.settings, engine, recorder))
        return recorder, engine

    def undisturbed(self) -> tuple[FaultyDisk, Path]:
        disk = FaultyDisk()
        self.run(self.folder / "whole", disk)
        return disk, self.folder / "whole"


def steps(recorder: Recorder) -> int:
    return sum(total for title, total in recorder.tasks if not title.startswith(OTHERS))


def left_over(out: Path) -> list[Path]:
    return [p for p in out.rglob("*") if p.name.endswith(".partial") or p.parent.name == "predictions"]


def check(case: Case, whole: Path, out: Path, at: int, fault: str) -> None:
    """Fails at one step, runs again, and compares all that a run leaves with an undisturbed one."""
    with pytest.raises((CerebellumError, Crashed, OSError)) as failed:
        case.run(out, FaultyDisk(at, fault))
        raise Crashed  # a fault that the run survived: a folder that could not be synced, say
    moment = f"step {at}, {fault}"
    assert not isinstance(failed.value, OSError), f"{moment}: {failed.value!r} is no line for people"
    before = ledger_rows(out) if (out / "ledger.sqlite").exists() else {}
    recorder, _ = case.run(out)
    after, wanted = ledger_rows(out), ledger_rows(whole)
    assert {key: after[key] for key in before} == before, f"{moment}: a measurement was changed"
    assert after == wanted, f"{moment}: other measurements"
    assert steps(recorder) <= len(wanted) - len(before), f"{moment}: something was measured twice"
    (made,) = out.glob("*-Cerebellum-*.gguf")
    (good,) = whole.glob("*-Cerebellum-*.gguf")
    assert made.read_bytes() == good.read_bytes(), f"{moment}: another file"
    assert (out / "plan.json").read_bytes() == (whole / "plan.json").read_bytes(), moment
    assert left_over(out) == [], moment


def check_every(case: Case, numbers: range, faults: tuple[str, ...]) -> None:
    disk, whole = case.undisturbed()
    for at in (
        numbers[: len(disk.steps)]
        if numbers.step == 1
        else range(numbers.start, len(disk.steps), numbers.step)
    ):
        for fault in faults:
            check(case, whole, case.folder / f"{at}-{fault}", at, fault)


@pytest.mark.parametrize("goal", GOALS)
def test_steps_of_every_sort_are_counted(goal: str, tmp_path: Path) -> None:
    disk, whole = Case(tmp_path, GOALS[goal]).undisturbed()
    counts = Counter(disk.steps)
    assert set(counts) >= {
        "create",
        "write",
        "sync",
        "replace",
        "sync_folder",
        "make_folder",
        "commit",
        "remove_tree",
    }
    assert counts["create"] == counts["sync"] == counts["replace"]
    assert not left_over(whole)
    print(goal, len(disk.steps), dict(counts))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("goal", GOALS)
def test_a_step_in_forty_fails_and_the_run_goes_on(goal: str, fault: str, tmp_path: Path) -> None:
    start = 3 + 7 * FAULTS.index(fault)
    check_every(Case(tmp_path, GOALS[goal]), range(start, 10**9, 40), (fault,))


@pytest.mark.slow
@pytest.mark.parametrize("goal", GOALS)
def test_every_step_fails_in_every_way_and_the_run_goes_on(goal: str, tmp_path: Path) -> None:
    check_every(Case(tmp_path, GOALS[goal]), range(10**9), FAULTS)
