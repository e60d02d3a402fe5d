"""Workers through Ray itself: real processes, killed ones, and what is said where Ray is missing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Cerebellum
from tiny import command, ledger_rows, ray_workers_of, run_process

from cerebellum.bench.tasks import SAMPLES

ROOT = Path(__file__).parent.parent


def without_ray(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a process in which Ray is not to be found, as where it was never installed."""
    program = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'ray' else find(name, *a)\n"
        "sys.modules['ray'] = None\n"
        "from cerebellum.cli.commands import main\n"
        "main()\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT
    )


@pytest.mark.parametrize("flags", [("--workers", 2), ("--workers", "auto"), ("--ray", "auto")])
def test_without_ray_it_is_one_line_with_the_command(
    tmp_path: Path, embedded: Path, flags: tuple[object, ...]
) -> None:
    found = without_ray("run", embedded, "-o", tmp_path / "run", *flags)
    assert found.returncode == 2 and found.stdout == ""
    (line,) = found.stderr.splitlines()
    assert line.startswith(f"cerebellum: {flags[0]}: several workers need Ray")
    assert "pip install 'cerebellum-gguf[ray]'" in line
    assert not (tmp_path / "run").exists()
    found = without_ray("bench", embedded, "-o", tmp_path / "run", *flags)
    assert found.returncode == 2 and found.stderr.splitlines() == [line]
    assert not (tmp_path / "run").exists()


def test_without_ray_one_worker_is_as_ever(tmp_path: Path, embedded: Path) -> None:
    found = without_ray("inspect", embedded, "--json")
    assert found.returncode == 0, found.stderr


def test_ray_is_imported_by_one_module_and_not_at_start() -> None:
    importing = [
        path.name
        for path in (ROOT / "cerebellum").rglob("*.py")
        if any(line.lstrip().startswith(("import ray", "from ray")) for line in path.read_text().splitlines())
    ]
    assert importing == ["ray_pool.py"]
    program = "import sys, cerebellum.cli.commands; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_a_wrong_number_of_workers_is_one_line(
    tmp_path: Path, embedded: Path, cerebellum: Cerebellum
) -> None:
    for wrong in ("0", "-1", "two"):
        ran = cerebellum("run", embedded, "-o", tmp_path / "run", "--workers", wrong)
        assert ran.code == 2 and "neither a number of workers" in ran.complaint
    ran = cerebellum("run", embedded, "-o", tmp_path / "run", "--worker-threads", 2)
    assert ran.code == 2 and "--worker-threads is of several workers" in ran.complaint


with_ray = pytest.mark.slow  # each starts Ray, which takes some seconds


@with_ray
@pytest.mark.parametrize("goal", [(), ("--budget", "Q3_K_M")], ids=["limit", "budget"])
def test_two_workers_end_as_one_bit_for_bit(
    tmp_path: Path, embedded: Path, select_text: Path, report_text: Path, goal: tuple[object, ...]
) -> None:
    base = ["run", embedded, "-o"]
    texts = ["--select-text", select_text, "--report-text", report_text, "--ctx", 128, "--threads", 1]
    more = [*texts, "--imatrix-chunks", 2, "--report-chunks", 3, *goal, "--json"]
    more += ["--bench", "--bench-limit", 12, "--data", SAMPLES]
    one = run_process(*base, tmp_path / "one", *more)
    two = run_process(*base, tmp_path / "two", *more, "--workers", 2, "--worker-threads", 1)
    assert one.code == 0 and two.code == 0, two.err
    assert one.json["plan"] == two.json["plan"] and one.json["verify"] == two.json["verify"]
    assert Path(one.json["file"]).read_bytes() == Path(two.json["file"]).read_bytes()
    answers = lines_of(tmp_path / "one" / "bench")
    assert lines_of(tmp_path / "two" / "bench") == answers and sum(map(len, answers.values())) == 2 * 6 * 12
    rows, others = ledger_rows(tmp_path / "one"), ledger_rows(tmp_path / "two")
    assert {key: others[key] for key in rows} == rows


def lines_of(folder: Path) -> dict[str, list[str]]:
    """The answers to questions by file, in one order."""
    return {file.name: sorted(file.read_text().splitlines()) for file in folder.glob("*.jsonl")}


@with_ray
def test_questions_asked_by_two_workers_have_the_answers_of_one_process(
    tmp_path: Path, embedded: Path
) -> None:
    """A worker is killed when the first answers are there; the other parts go to the one that takes its place."""
    smaller = tmp_path / "smaller.gguf"
    assert run_process("quantize", embedded, "Q8_0", "-o", smaller, "--encoder", "ggml").code == 0
    base = ["bench", embedded, "--against", smaller, "--data", SAMPLES, "--generate", 2, "--json"]
    one = run_process(*base, "--threads", 1, "-o", tmp_path / "one")
    assert one.code in (0, 1), one.err
    asked = command(*base, "-o", tmp_path / "two", "--workers", 2, "--worker-threads", 1)
    with (tmp_path / "log").open("w") as log, (tmp_path / "answer").open("w") as answer:
        process = subprocess.Popen(asked, stdout=answer, stderr=log)
    while process.poll() is None and not any(lines_of(tmp_path / "two").values()):
        time.sleep(0.01)
    os.kill(sorted(ray_workers_of(process.pid))[0], signal.SIGKILL)
    assert process.wait(300) == one.code, (tmp_path / "log").read_text()
    assert lines_of(tmp_path / "two") == lines_of(tmp_path / "one")
    two = json.loads((tmp_path / "answer").read_text())
    assert "died on" in (tmp_path / "log").read_text()
    assert {**two, "session": ()} == {**one.json, "session": ()}


@with_ray
@pytest.mark.parametrize("victim", ["worker", "driver"])
def test_killed_at_ten_moments_it_ends_as_if_nothing_had_been(
    tmp_path: Path, embedded: Path, select_text: Path, report_text: Path, victim: str
) -> None:
    texts = ["--select-text", select_text, "--report-text", report_text, "--ctx", 64, "--threads", 1]
    more = [*texts, "--imatrix-chunks", 2, "--report-chunks", 5]
    one = run_process("run", embedded, "-o", tmp_path / "one", *more, "--json")
    assert one.code == 0, one.err
    folder = tmp_path / "two"
    asked = ["run", embedded, "-o", folder, *more, "--workers", 2, "--worker-threads", 1]
    total = len(ledger_rows(tmp_path / "one"))
    killed = 0
    moments = [1 + total * k // 11 for k in range(10)]
    before: dict[tuple[object, ...], bytes] = {}
    while killed < len(moments):
        with (tmp_path / "log").open("w") as log, (tmp_path / "answer").open("w") as answer:
            process = subprocess.Popen(command(*asked, "--json"), stdout=answer, stderr=log)
        while killed < len(moments) and process.poll() is None:
            if len(ledger_rows(folder)) < moments[killed]:
                time.sleep(0.01)
                continue
            if victim == "driver":
                process.kill()
                process.wait()
            else:
                living = sorted(ray_workers_of(process.pid))
                if len(living) < 2:
                    time.sleep(0.05)
                    continue
                os.kill(living[0], signal.SIGKILL)  # the older one, which has something under way
            killed += 1
            now = ledger_rows(folder)
            assert {key: now[key] for key in before} == before
            before = now
        if victim == "worker":
            assert process.wait(300) in (0, 1), (tmp_path / "log").read_text()
            json.loads((tmp_path / "answer").read_text())  # Ray tells of the dead, and not there
            assert "died on" in (tmp_path / "log").read_text()
            break
    assert killed >= (10 if victim == "driver" else 5), killed
    two = run_process(*asked, "--json")
    assert two.code == one.code, two.err
    assert one.json["plan"] == two.json["plan"]
    assert Path(one.json["file"]).read_bytes() == Path(two.json["file"]).read_bytes()
    rows = ledger_rows(tmp_path / "one")
    others = ledger_rows(folder)
    assert {key: others[key] for key in rows} == rows
