"""Steps that change the disk or start a program fail, in runs of both goals and beside them; all goes on after it.

`python -m tests.faults` does so for every step in every way, on as many cores as there are.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from faults import CASES, Chat, attempt, jobs_of, told
from faulty_disk import FAULTS, FaultyDisk

from cerebellum.encode import library
from cerebellum.errors import BadInput
from cerebellum.files import Disk
from cerebellum.llama import guard

RUNS = ("limit", "budget")


def check_some(name: str, folder: Path, faults: tuple[str, ...], start: int, every: int) -> None:
    case = CASES[name](folder)
    outcomes = [
        attempt(case, name, at, fault, folder / f"{at}-{fault}")
        for at in range(start, len(case.steps), every)
        for fault in faults
    ]
    assert outcomes
    assert [one for one in outcomes if one.problem is not None] == []


@pytest.mark.parametrize("name", RUNS)
def test_steps_of_every_sort_are_counted(name: str, tmp_path: Path) -> None:
    case = CASES[name](tmp_path)
    counts = Counter(case.steps)
    sorts = {"create", "write", "sync", "replace", "sync_folder", "make_folder", "commit", "remove_tree"}
    assert set(counts) >= sorts | {"spawn"}
    assert counts["create"] == counts["sync"] == counts["replace"]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", RUNS)
def test_a_step_in_eighty_fails_and_the_run_goes_on(name: str, fault: str, tmp_path: Path) -> None:
    check_some(name, tmp_path, (fault,), 3 + 13 * FAULTS.index(fault), 80)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_of_a_conversion_fails_and_it_is_made_again(fault: str, tmp_path: Path) -> None:
    check_some("conversion", tmp_path, (fault,), FAULTS.index(fault), 7)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_step_fails_in_every_way_and_all_goes_on(name: str, tmp_path: Path) -> None:
    check_some(name, tmp_path, FAULTS, 0, 1)


def test_pieces_and_samples_are_of_every_kind_and_figures_add_up(tmp_path: Path) -> None:
    steps = {"chat": 1, "limit": 30}
    every = jobs_of(steps, None, 1)
    assert len(set(every)) == len(every) == 31 * len(FAULTS)
    assert sorted(every[0::3] + every[1::3] + every[2::3]) == sorted(every)
    assert Counter(job[2] for job in jobs_of(steps, 4, 1)) == Counter(dict.fromkeys(FAULTS, 5))
    case = Chat(tmp_path)
    found = [attempt(case, "chat", 0, fault, tmp_path) for fault in FAULTS]
    figures = told({"chat": Counter(case.steps)}, found, 1.0)
    assert (figures["tried"], figures["ended_the_same"]) == (len(FAULTS), len(FAULTS))


@pytest.mark.parametrize("name", ["replace", "unlink", "make_folder", "remove_folder", "remove_tree", "link"])
def test_a_step_that_a_signal_interrupts_is_taken_again(name: str, tmp_path: Path) -> None:
    disk = FaultyDisk(0, "interrupted")
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    arguments = {
        "replace": (tmp_path / "a", tmp_path / "b"),
        "unlink": (tmp_path / "a",),
        "make_folder": (tmp_path / "new",),
        "link": (tmp_path / "new", tmp_path / "a"),
    }.get(name, (tmp_path / "empty",))
    getattr(disk, name)(*arguments)
    assert disk.steps == [name, name]
    left = {path.name for path in tmp_path.iterdir()}
    wanted = {
        "replace": {"b", "empty"},
        "unlink": {"empty"},
        "make_folder": {"a", "empty", "new"},
        "link": {"a", "empty", "new"},
    }
    assert left == wanted.get(name, {"a"})


class DoneBefore(Disk):
    """A network file system that carries a call out and then says that a signal interrupted it."""

    def __init__(self, act: object) -> None:
        self.act = act

    def before(self, step: str) -> None:
        if self.act is not None:
            act = self.act
            self.act = None
            act()  # type: ignore[operator]
            raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))


def test_an_interrupted_step_that_was_carried_out_is_done(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(b"x")
    DoneBefore(lambda: os.replace(old, new)).replace(old, new)
    assert new.read_bytes() == b"x"
    DoneBefore(new.unlink).unlink(new)
    assert not new.exists()


def test_an_interrupted_rename_of_nothing_is_no_success(tmp_path: Path) -> None:
    disk = FaultyDisk(0, "interrupted")
    with pytest.raises(FileNotFoundError):
        disk.replace(tmp_path / "none", tmp_path / "new")
    with pytest.raises(FileNotFoundError):
        Disk().unlink(tmp_path / "none")


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.ENOMEM, errno.EMFILE])
def test_a_program_that_cannot_be_started_now_is_one_line(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(subprocess, "Popen", full)
    with pytest.raises(BadInput, match=r"run again$"):
        guard.try_opening(tmp_path / "model.gguf", 1)
    with pytest.raises(BadInput, match=r"run again$"):
        Chat(tmp_path)
    with pytest.raises(BadInput, match="--encoder ggml"):
        library._run(["cc"])


def test_a_compiler_that_is_none_is_no_error(tmp_path: Path) -> None:
    with pytest.raises(library.Unavailable, match="cannot be run"):
        library._run([str(tmp_path / "cc")])


def test_a_full_disk_never_makes_ggmls_encoder_the_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on would make other bytes than it began with."""
    failed = SimpleNamespace(returncode=1, stderr="cc: No space left on device\n", stdout="")
    monkeypatch.setattr(library, "_run", lambda command: failed)
    with pytest.raises(BadInput, match="disk full"):
        library.compile_library("cc", (), tmp_path / "encoder.so")
    failed.stderr = "kquants.c:1: error\n"
    with pytest.raises(library.Unavailable, match=r"kquants\.c:1"):
        library.compile_library("cc", (), tmp_path / "encoder.so")
