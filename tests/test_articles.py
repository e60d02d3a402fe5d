"""The benchmarks' texts: chunks know their article or module, and no module selects and reports."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from cerebellum.engine.fake import FakeEngine
from cerebellum.texts import load_corpus

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the benchmarks on Python's path: they are scripts, and no part of the package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("common", "code_texts"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return BENCHMARKS


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


def test_chunks_know_their_article(benchmarks: Path, tmp_path: Path, hybrid: Path) -> None:
    """Tokens of the fake are bytes: 64 to a chunk, the second article begins in the middle of the third."""
    text = tmp_path / "text.txt"
    first = " = One = \n" + " = = a section = = \n" + "a" * (2 * 64 + 20 - 30)
    text.write_text(first + "\n = Two = \n" + "b" * 200)
    corpus = load_corpus(FakeEngine(), hybrid, text, 64)
    found = module("common").articles(FakeEngine(), hybrid, corpus)
    assert found == [0, 0, 1, 1, 1]


def test_the_texts_of_code_have_no_module_in_common(benchmarks: Path, tmp_path: Path) -> None:
    articles = module("code_texts")
    assert not set(articles.SELECT_MODULES) & set(articles.REPORT_MODULES)
    text = articles.code_text(tmp_path / "code.txt", ("ast", "no such module")).read_text()
    assert text.startswith("# module ast\n") and "no such module" not in text and len(text) < 13_000
