"""The ledger: what is in it is never changed, never doubled, and read back as it was asked for."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pytest

from cerebellum.errors import BadInput
from cerebellum.ledger import Ledger, SeriesKey

KEY = SeriesKey(variant="v", text="t", ctx=8, engine="e", label="base")


def n_chunks(ledger: Ledger) -> int:
    with sqlite3.connect(ledger.path) as database:
        return int(database.execute("SELECT count(*) FROM chunk").fetchone()[0])


def test_a_settled_ledger_is_one_file(path: Path, tmp_path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.record(ledger.series(KEY), 1, vector(1))
        ledger.settle()
        (tmp_path / "copy.sqlite").write_bytes(path.read_bytes())
        assert path.with_name(f"{path.name}-wal").stat().st_size == 0
    with Ledger(tmp_path / "copy.sqlite") as copy:
        assert n_chunks(copy) == 1


def vector(chunk: int) -> np.ndarray:
    return np.arange(3, dtype=np.float32) + np.float32(chunk) / 7


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


def filled(path: Path, chunks: list[int], key: SeriesKey = KEY) -> None:
    with Ledger(path) as ledger:
        series = ledger.series(key)
        for chunk in chunks:
            ledger.record(series, chunk, vector(chunk))


def test_a_second_measurement_of_a_chunk_raises_and_changes_nothing(path: Path) -> None:
    filled(path, [4])
    with Ledger(path) as ledger:
        before = ledger.digest()
        with pytest.raises(sqlite3.IntegrityError):
            ledger.record(ledger.series(KEY), 4, vector(5))
        assert np.array_equal(ledger.nll(ledger.series(KEY), [4])[0], vector(4))
        assert ledger.digest() == before and n_chunks(ledger) == 1


def test_vectors_come_back_in_the_order_asked_for_bit_for_bit(path: Path) -> None:
    filled(path, [3, 1, 2])
    with Ledger(path) as ledger:
        found = ledger.nll(ledger.series(KEY), [2, 3, 1, 3])
    assert found.dtype == np.float32
    assert np.array_equal(found, np.stack([vector(2), vector(3), vector(1), vector(3)]))


def test_what_is_not_finite_is_kept_as_it_is(path: Path) -> None:
    strange = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45], np.float32)
    with Ledger(path) as ledger:
        ledger.record(ledger.series(KEY), 0, strange)
        assert ledger.nll(ledger.series(KEY), [0]).tobytes() == strange.tobytes()


def test_a_record_is_there_for_others_at_once(path: Path) -> None:
    """One commit each: a second connection sees it while the first is still open."""
    with Ledger(path) as writer, Ledger(path) as reader:
        series = writer.series(KEY)
        for chunk in range(3):
            writer.record(series, chunk, vector(chunk))
            assert reader.measured(series) == frozenset(range(chunk + 1))


def test_reopened_it_is_the_same(path: Path) -> None:
    filled(path, [0, 1])
    with Ledger(path) as ledger:
        digest = ledger.digest()
    filled(path, [])
    with Ledger(path) as ledger:
        assert ledger.digest() == digest
        assert ledger.measured(ledger.series(KEY)) == {0, 1}
        assert n_chunks(ledger) == 2


def test_series_are_apart_in_everything_but_the_label(path: Path) -> None:
    others = [
        SeriesKey(variant="w", text="t", ctx=8, engine="e"),
        SeriesKey(variant="v", text="u", ctx=8, engine="e"),
        SeriesKey(variant="v", text="t", ctx=9, engine="e"),
        SeriesKey(variant="v", text="t", ctx=8, engine="f"),
    ]
    with Ledger(path) as ledger:
        first = ledger.series(KEY)
        assert ledger.series(SeriesKey(variant="v", text="t", ctx=8, engine="e", label="other")) == first
        ids = {first, *(ledger.series(key) for key in others)}
        assert len(ids) == 5
        ledger.record(first, 0, vector(0))
        assert all(ledger.measured(ledger.series(key)) == frozenset() for key in others)


def test_the_digest_does_not_depend_on_the_order_of_work(tmp_path: Path) -> None:
    other = SeriesKey(variant="a", text="t", ctx=8, engine="e", label="another")
    one, two, three = (tmp_path / f"{number}.sqlite" for number in range(3))
    filled(one, [0, 1, 2])
    filled(one, [5, 4], other)
    filled(two, [4, 5], other)
    filled(two, [2, 0, 1])
    filled(three, [2, 0, 1, 3])
    filled(three, [4, 5], other)
    digests = []
    for path in (one, two, three):
        with Ledger(path) as ledger:
            digests.append(ledger.digest())
    assert digests[0] == digests[1] != digests[2]


def test_the_digest_sees_one_bit(tmp_path: Path) -> None:
    digests = set()
    for number, value in enumerate((1.0, np.nextafter(np.float32(1.0), np.float32(2.0)))):
        with Ledger(tmp_path / f"{number}.sqlite") as ledger:
            ledger.record(ledger.series(KEY), 0, np.array([value], np.float32))
            digests.add(ledger.digest())
    assert len(digests) == 2


def test_content_hashes_are_known_by_name_and_recipe(path: Path) -> None:
    with Ledger(path) as ledger:
        assert ledger.content_hash("a.gguf", "r") is None
        ledger.record_content_hash("a.gguf", "r", "abc")
    with Ledger(path) as ledger:
        assert ledger.content_hash("a.gguf", "r") == "abc"
        assert ledger.content_hash("a.gguf", "s") is None
        assert ledger.content_hash("b.gguf", "r") is None


def test_an_older_ledger_gets_the_table_of_entropies(path: Path) -> None:
    filled(path, [0, 1])
    database = sqlite3.connect(path)
    database.executescript("DROP TABLE entropy; PRAGMA user_version = 1;")
    database.close()
    for _ in range(2):
        with Ledger(path) as ledger:
            series = ledger.series(KEY)
            assert ledger.measured(series) == {0, 1}
            ledger.record_entropy(series, 1, np.array([1.0, 3.0]))
            ledger.record_entropy(series, 1, np.array([7.0, 7.0]))  # what is there stays
            assert ledger.entropies(series) == {1: 2.0}


def test_what_stays_is_not_sealed_with_what_came_later(path: Path) -> None:
    """Entropies of a release without checksums, measured again with other last bits."""
    filled(path, [0, 1])
    with Ledger(path) as ledger:
        ledger.record_entropy(ledger.series(KEY), 1, np.array([1.0, 3.0]))
    database = sqlite3.connect(path)
    database.executescript("DELETE FROM seal;")
    database.close()
    with Ledger(path) as ledger:
        ledger.record_entropy(ledger.series(KEY), 1, np.array([7.0, 7.0]))
        assert ledger.entropies(ledger.series(KEY)) == {1: 2.0}


@pytest.mark.parametrize("version", [-1, 99])
def test_another_schema_version_is_refused(path: Path, version: int) -> None:
    filled(path, [0])
    database = sqlite3.connect(path)
    database.execute(f"PRAGMA user_version = {version}")
    database.close()
    with pytest.raises(BadInput, match=rf"ledger\.sqlite.*version {version}"):
        Ledger(path)


@pytest.mark.parametrize("raw", [b"this is no database at all" * 400, b"SQLite format 3\0" + b"\xff" * 9000])
def test_a_file_that_is_no_ledger_is_refused(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
    with pytest.raises(BadInput, match=r"ledger\.sqlite: not a usable ledger") as caught:
        Ledger(path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not a usable ledger"):
        Ledger(tmp_path / "nowhere" / "ledger.sqlite")


def test_damage_inside_is_refused_too(path: Path) -> None:
    """A ledger whose first page is sound and whose others are not, as after a bad copy."""
    with Ledger(path) as ledger:
        series = ledger.series(KEY)
        for chunk in range(50):
            ledger.record(series, chunk, np.ones(1000, np.float32))
    raw = bytearray(path.read_bytes())
    raw[4096:] = b"\xa5" * (len(raw) - 4096)
    path.write_bytes(raw)
    with pytest.raises(BadInput), Ledger(path) as ledger:
        ledger.nll(ledger.series(KEY), [0])
