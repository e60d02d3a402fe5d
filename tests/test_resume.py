"""kill -9 at any moment, then the same command again: nothing lost, nothing measured twice."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Finished
from tiny import command, ledger_rows, run_process, tiny_run

from cerebellum.bench.tasks import SAMPLES
from cerebellum.llama.native import LlamaEngine
from cerebellum.texts import load_corpus

CHUNKS, REPORT_CHUNKS = 6, 8
Rows = dict[tuple[Any, ...], bytes]


def digest(rows: Rows) -> str:
    total = hashlib.sha256()
    for key in sorted(rows):
        total.update(repr(key).encode() + rows[key])
    return total.hexdigest()


def killed_when(asked: list[object], reached: Callable[[], bool], log: Path) -> None:
    """Starts the command and kills it with SIGKILL as soon as ``reached``."""
    with log.open("w") as stderr:
        process = subprocess.Popen(command(*asked), stdout=subprocess.DEVNULL, stderr=stderr)
        try:
            deadline = time.monotonic() + 120
            while not reached():
                assert process.poll() is None, f"it ended before it could be killed: {log.read_text()}"
                assert time.monotonic() < deadline
                time.sleep(0.002)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def asked(embedded: Path, select_text: Path, report_text: Path) -> Callable[[Path], list[object]]:
    more = ("--chunks", CHUNKS, "--report-chunks", REPORT_CHUNKS, "--ctx", 128)
    return lambda folder: tiny_run(embedded, folder, select_text, report_text, *more)


def test_killed_in_every_stage_it_ends_as_if_nothing_had_been(
    asked: Callable[[Path], list[object]],
    embedded: Path,
    llama_engine: LlamaEngine,
    report_text: Path,
    tmp_path: Path,
) -> None:
    whole, folder, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    undisturbed = run_process(*asked(whole), "--json")
    assert undisturbed.code == 0, undisturbed.err
    expected = ledger_rows(whole)
    reported = load_corpus(llama_engine, embedded, report_text, 128).sha256

    def rows_on(report: bool) -> int:
        return sum((key[1] == reported) == report for key in ledger_rows(folder))

    shards = folder / "shards"
    n_selection = sum(key[1] != reported for key in expected)
    moments: list[tuple[str, Callable[[], bool]]] = [
        ("imatrix", lambda: "importance matrix" in log.read_text()),
        ("shards", lambda: len(list(shards.glob("*.gguf"))) >= 5),
        ("measurement", lambda: rows_on(report=False) >= 2),
        ("measurement, later", lambda: rows_on(report=False) >= n_selection // 2),
        ("report", lambda: rows_on(report=True) >= 3),
        ("report, later", lambda: rows_on(report=True) >= 2 * REPORT_CHUNKS),
    ]
    before: Rows = {}
    for _stage, reached in moments:
        killed_when(asked(folder), reached, log)
        after = ledger_rows(folder)
        assert digest({key: after[key] for key in before}) == digest(before)
        before = after
    assert 0 < len(before) < len(expected)

    resumed = run_process(*asked(folder), "--json")
    assert resumed.code == 0, resumed.err
    after = ledger_rows(folder)
    assert digest({key: after[key] for key in before}) == digest(before)
    assert len(after) == len(expected) and digest(after) == digest(expected)
    assert Path(resumed.json["file"]).read_bytes() == Path(undisturbed.json["file"]).read_bytes()
    assert resumed.json["plan"] == undisturbed.json["plan"]
    assert not list(folder.rglob("*.partial"))
    repeated = len(before) + steps_reported(resumed.err) - len(expected)
    assert repeated == 0, f"{repeated} measurements were made twice"


@pytest.mark.parametrize("moment", [3, 30])
def test_killed_among_the_questions_it_asks_only_the_rest(
    finished: Finished, tmp_path: Path, moment: int
) -> None:
    """`run --bench` on a finished run: nothing is measured again, no question is asked twice."""
    folder, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(finished.folder, folder)
    asked = list(finished.arguments)
    asked[asked.index("-o") + 1] = folder
    asked += ["--bench", "--bench-limit", 4, "--data", SAMPLES]
    killed_when(asked, lambda: len(evidence(folder)) >= moment, log)
    before = evidence(folder)
    resumed = run_process(*asked, "--json")
    assert resumed.code == 0, resumed.err
    after = evidence(folder)
    assert set(before) < set(after) and len(after) == len(set(after)) == 2 * 2 * 3 * 4
    session = resumed.json["bench"]["session"]
    assert sum(row["asked"] for row in session) == len(after) - len(before)
    assert sum(row["reused"] for row in session) == len(before)
    assert resumed.json["bench"] == json.loads((folder / "bench.json").read_text())
    assert str(tmp_path) not in (folder / "bench.json").read_text()
    assert "## Benchmarks" in (folder / "README.md").read_text()
    assert "<h2>Benchmarks</h2>" in (folder / "report.html").read_text()


def evidence(folder: Path) -> list[str]:
    """The whole lines of every file of answers, each with its file's name."""
    return [
        f"{path.name}: {line}"
        for path in sorted((folder / "bench").glob("*.jsonl"))
        for line in path.read_text("utf-8").splitlines(keepends=True)
        if line.endswith("\n")
    ]


def steps_reported(log: str) -> int:
    """Chunks that a run said it would measure: every `<variant>: N steps` but the other tasks' lines."""
    counts = [line.rsplit(": ", 1) for line in log.splitlines() if line.endswith(" steps")]
    others = ("importance matrix", "reading the source", "hashing the source")
    return sum(int(count.split()[0]) for title, count in counts if not title.startswith(others))


def test_measure_counts_what_it_found_and_what_it_made(
    asked: Callable[[Path], list[object]], tmp_path: Path
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    measure = ["measure", *asked(folder)[1:]]
    killed_when(measure, lambda: len(ledger_rows(folder)) >= 7, log)
    before = ledger_rows(folder)
    again = run_process(*measure, "--json")
    assert again.code == 0, again.err
    after = ledger_rows(folder)
    assert again.json["measured"] + len(before) == len(after)
    assert again.json["reused"] == len(before)
    assert {key: after[key] for key in before} == before
    assert len(after) % CHUNKS == 0
