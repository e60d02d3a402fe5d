"""The benchmarks' intervals by document: they hold their level where chunks of a document are alike."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from numpy.typing import NDArray

from cerebellum.engine.fake import FakeEngine
from cerebellum.stats.paired import superpopulation_interval
from cerebellum.texts import load_corpus

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def articles() -> ModuleType:
    """The module, which is a script's helper and no part of the package."""
    spec = importlib.util.spec_from_file_location("articles", BENCHMARKS / "articles.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["articles"] = module
    spec.loader.exec_module(module)
    return module


def draw(rng: np.random.Generator, documents: int = 40) -> tuple[NDArray[np.float64], ...]:
    """Returns chunks of documents of 1 to 12 chunks: values, a reference twice as high, and whose they are."""
    sizes = rng.integers(1, 13, documents)
    which = np.repeat(np.arange(documents), sizes)
    level = rng.gamma(4.0, 0.25, documents)[which]
    share = rng.normal(0.5, 0.1, documents)[which]
    reference = level * rng.gamma(30.0, 1 / 30, len(which))
    return reference * share, reference, which


def test_intervals_by_document_hold_where_those_by_chunk_do_not(articles: ModuleType) -> None:
    rng = np.random.default_rng(1)
    by_document = by_chunk = 0
    for _ in range(400):
        values, reference, which = draw(rng)
        found = articles.ratio_by_document(values, reference, which)
        by_document += found.low <= 0.5 <= found.high
        naive = superpopulation_interval(values - 0.5 * reference)
        by_chunk += naive.low <= 0 <= naive.high
    assert 0.92 <= by_document / 400 <= 0.98
    assert by_chunk / 400 < 0.85


def test_a_ratio_of_one_document_has_no_end_and_less_is_turned_round(articles: ModuleType) -> None:
    one = articles.ratio_by_document(np.ones(4), np.full(4, 2.0), np.zeros(4, np.int64))
    assert one.value == 0.5 and one.high == np.inf and one.low == -np.inf
    assert articles.Ratio(value=0.6, low=0.5, high=0.7, documents=9).less_pct() == pytest.approx([40, 30, 50])


def test_chunks_know_their_article(articles: ModuleType, tmp_path: Path, hybrid: Path) -> None:
    """Tokens of the fake are bytes: 64 to a chunk, the second article begins in the middle of the third."""
    text = tmp_path / "text.txt"
    first = " = One = \n" + " = = a section = = \n" + "a" * (2 * 64 + 20 - 30)
    text.write_text(first + "\n = Two = \n" + "b" * 200)
    corpus = load_corpus(FakeEngine(), hybrid, text, 64)
    found = articles.document_of(FakeEngine(), hybrid, corpus)
    assert found.tolist() == [0, 0, 1, 1, 1]


def test_the_texts_of_code_have_no_module_in_common(articles: ModuleType, tmp_path: Path) -> None:
    assert not set(articles.SELECT_MODULES) & set(articles.REPORT_MODULES)
    text = articles.code_text(tmp_path / "code.txt", ("ast", "no such module")).read_text()
    assert text.startswith("# module ast\n") and "no such module" not in text and len(text) < 13_000
