"""Fixtures: the embedded model, small texts, the fake bench, one finished run shared by all."""

from __future__ import annotations

import io
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny import Bench, Ran, make_bench, run_process, tiny_run, write_hybrid

from cerebellum.cli import commands as cli
from cerebellum.engine.fake import FakeEngine
from cerebellum.llama.native import EngineSettings, LlamaEngine
from cerebellum.settings import DEMO_MODEL, REPORT_TEXT, SELECTION_TEXT

Cerebellum = Callable[..., Ran]


def pytest_unconfigure() -> None:
    """llama-cpp-python opens /dev/null twice when imported and never closes it: no warning at exit."""
    utils = sys.modules.get("llama_cpp._utils")
    for name in ("outnull_file", "errnull_file"):
        if hasattr(utils, name):
            getattr(utils, name).close()


@pytest.fixture(scope="session")
def embedded() -> Path:
    """The model that comes with the package."""
    return DEMO_MODEL


@pytest.fixture(scope="session")
def llama_engine() -> LlamaEngine:
    return LlamaEngine(EngineSettings(threads=2))


@pytest.fixture
def fake_engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="session")
def select_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few thousand bytes that decide."""
    return _head(SELECTION_TEXT, tmp_path_factory.mktemp("text") / "select.txt")


@pytest.fixture(scope="session")
def report_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few thousand bytes that report."""
    return _head(REPORT_TEXT, tmp_path_factory.mktemp("text") / "report.txt")


def _head(text: Path, out: Path) -> Path:
    start = text.read_text(encoding="utf-8")[:6000]
    out.write_text(start, encoding="utf-8")
    return out


@pytest.fixture(scope="session")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic source with granitehybrid's names."""
    return write_hybrid(tmp_path_factory.mktemp("hybrid") / "hybrid.F16.gguf")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Four roles on the fake engine, each with its own damage at Q2_K, nats/token."""
    return make_bench(
        tmp_path / "bench", ffn_gate_exps=0.05, ffn_down_exps=0.1, ffn_gate_shexp=0.01, ssm_in=0.2
    )


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A run that went well: its folder, what it printed, and how it was asked for."""

    folder: Path
    arguments: list[object]
    ran: Ran
    answer: dict[str, Any]

    @property
    def gguf(self) -> Path:
        return Path(self.answer["file"])

    def read(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, embedded: Path, select_text: Path, report_text: Path
) -> Finished:
    """The whole pipeline on the embedded model, in a process of its own. Leave its files alone."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    arguments = tiny_run(embedded, folder, select_text, report_text)
    ran = run_process(*arguments, "--json")
    assert ran.code == 0, ran.err
    return Finished(folder=folder, arguments=arguments, ran=ran, answer=ran.json)


@pytest.fixture
def cerebellum(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cerebellum]:
    """The command line in this process: quick, with its exit code, stdout and stderr."""
    before = signal.getsignal(signal.SIGTERM)

    def call(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["cerebellum", *map(str, arguments)])
        out, err, code = io.StringIO(), io.StringIO(), 0
        with redirect_stdout(out), redirect_stderr(err):
            try:
                cli.main()
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 1
        return Ran(code=code, out=out.getvalue(), err=err.getvalue())

    yield call
    signal.signal(signal.SIGTERM, before)
