"""One SQLite file. A row is written once, when its chunk is finished, and never changed.

A measurement is keyed by everything that can change it and nothing else: the bytes of the shards,
the text, the chunk length, the engine's identity and the version of the metric.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cerebellum.errors import BadInput

SCHEMA_VERSION = 1  # 1: first release
METRIC_VERSION = 1  # 1: per-token NLL of the second half of each chunk, float32 nats

SCHEMA = """
-- What was measured: a list of shards over one text, by one engine.
CREATE TABLE series (
    id      INTEGER PRIMARY KEY,
    variant TEXT NOT NULL,     -- sha256 over the sha256 of each shard, in order
    text    TEXT NOT NULL,     -- sha256 of the text
    ctx     INTEGER NOT NULL,  -- tokens in a chunk
    engine  TEXT NOT NULL,     -- build and device of llama.cpp
    metric  INTEGER NOT NULL,  -- METRIC_VERSION
    label   TEXT NOT NULL,     -- for people; not part of the key
    UNIQUE (variant, text, ctx, engine, metric)
);
-- One row a chunk: the vector is kept, not its mean, so that any pairing can be redone.
CREATE TABLE chunk (
    series INTEGER NOT NULL REFERENCES series (id),
    chunk  INTEGER NOT NULL,   -- index in the text
    nll    BLOB NOT NULL,      -- float32 little-endian nats, one for each scored token
    PRIMARY KEY (series, chunk)
) WITHOUT ROWID;
-- How far a variant's predictions are from the base's, for the chunks whose base logits were kept.
CREATE TABLE divergence (
    series INTEGER NOT NULL REFERENCES series (id),
    base   INTEGER NOT NULL REFERENCES series (id),
    chunk  INTEGER NOT NULL,
    kld    BLOB NOT NULL,      -- float32 nats, KL(base || variant) at each scored token
    same   BLOB NOT NULL,      -- uint8, 1 where both have the same most likely token
    PRIMARY KEY (series, base, chunk)
) WITHOUT ROWID;
-- Content hashes of files that were already read once, by what would change them.
CREATE TABLE content (
    name   TEXT NOT NULL,      -- file name in the shards folder
    recipe TEXT NOT NULL,      -- what the file was made from
    sha256 TEXT NOT NULL,
    PRIMARY KEY (name, recipe)
) WITHOUT ROWID;
"""

Vector = NDArray[np.float64]
Matrix = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class SeriesKey:
    """Everything that can change a measurement; ``label`` is only for people."""

    variant: str
    text: str
    ctx: int
    engine: str
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """KL divergence (nats) and top-token agreement against a base series, over a chunk's tokens."""

    base_series: int
    kld: NDArray[np.floating]
    same_top: NDArray[np.bool_]


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """SQLite's errors (a full disk, damaged pages) as one line."""
    try:
        yield
    except sqlite3.IntegrityError:
        raise  # a second measurement of the same chunk: a bug, not bad input
    except sqlite3.DatabaseError as error:
        raise BadInput(f"{path}: the ledger cannot be used ({error}); free space, or move it away") from error


class Ledger:
    """Open with ``with Ledger(path) as ledger``; each ``record`` is one commit."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._db = sqlite3.connect(path)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._prepare()
        except sqlite3.DatabaseError as error:
            raise BadInput(f"{path}: not a usable ledger ({error}); move it away to start anew") from error

    def _prepare(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version == 0:
            with self._db:
                self._db.executescript(f"BEGIN;{SCHEMA}PRAGMA user_version = {SCHEMA_VERSION};COMMIT;")
        elif version != SCHEMA_VERSION:
            raise BadInput(
                f"{self.path}: ledger version {version}, this Cerebellum reads {SCHEMA_VERSION}; "
                "use the release that wrote it, or another folder"
            )

    def _rows(self, query: str, values: tuple[object, ...] = ()) -> list[tuple[Any, ...]]:
        with _refusing(self.path):
            return self._db.execute(query, values).fetchall()

    def series(self, key: SeriesKey) -> int:
        """The row id of a series, made on first use."""
        values = (key.variant, key.text, key.ctx, key.engine, METRIC_VERSION)
        with _refusing(self.path), self._db:
            self._db.execute(
                "INSERT OR IGNORE INTO series (variant, text, ctx, engine, metric, label) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (*values, key.label),
            )
        ((found,),) = self._rows(
            "SELECT id FROM series WHERE variant=? AND text=? AND ctx=? AND engine=? AND metric=?", values
        )
        return int(found)

    def measured(self, series: int) -> frozenset[int]:
        """Chunks that are already in the ledger."""
        rows = self._rows("SELECT chunk FROM chunk WHERE series=?", (series,))
        return frozenset(chunk for (chunk,) in rows)

    def nll(self, series: int, chunks: Iterable[int]) -> Matrix:
        """The vectors of ``chunks``, in their order: (chunks, scored tokens) float32 nats."""
        wanted = list(chunks)
        rows = dict(self._rows("SELECT chunk, nll FROM chunk WHERE series=?", (series,)))
        return np.stack([np.frombuffer(rows[chunk], "<f4") for chunk in wanted])

    def record(
        self, series: int, chunk: int, nll: NDArray[np.floating], divergence: Divergence | None = None
    ) -> None:
        """Commits one finished chunk. A second measurement of it is a bug and raises."""
        blob = np.asarray(nll, "<f4").tobytes()
        with _refusing(self.path), self._db:
            self._db.execute("INSERT INTO chunk VALUES (?, ?, ?)", (series, chunk, blob))
            if divergence is not None:
                self._insert_divergence(series, chunk, divergence)

    def record_divergence(self, series: int, chunk: int, divergence: Divergence) -> None:
        """Commits the divergence of a chunk whose NLL is known: from another reference, say."""
        with _refusing(self.path), self._db:
            self._insert_divergence(series, chunk, divergence)

    def _insert_divergence(self, series: int, chunk: int, divergence: Divergence) -> None:
        kld = np.asarray(divergence.kld, "<f4").tobytes()
        same = np.asarray(divergence.same_top, np.uint8).tobytes()
        row = (series, divergence.base_series, chunk, kld, same)
        self._db.execute("INSERT INTO divergence VALUES (?, ?, ?, ?, ?)", row)

    def diverged(self, series: int, base_series: int) -> dict[int, float]:
        """Chunk -> mean KL divergence (nats/token), of every chunk that has one."""
        rows = self._rows(
            "SELECT chunk, kld FROM divergence WHERE series=? AND base=?", (series, base_series)
        )
        return {chunk: float(np.frombuffer(kld, "<f4").mean(dtype=np.float64)) for chunk, kld in rows}

    def divergence(self, series: int, base_series: int) -> tuple[Vector, Vector]:
        """(mean KL divergence, share of equal top tokens) of every chunk that has them, each (chunks,)."""
        rows = self._rows(
            "SELECT kld, same FROM divergence WHERE series=? AND base=? ORDER BY chunk", (series, base_series)
        )
        kld = np.array([np.frombuffer(kld, "<f4").mean(dtype=np.float64) for kld, _ in rows], np.float64)
        same = np.array([np.frombuffer(same, np.uint8).mean() for _, same in rows], np.float64)
        return kld, same

    def content_hash(self, name: str, recipe: str) -> str | None:
        rows = self._rows("SELECT sha256 FROM content WHERE name=? AND recipe=?", (name, recipe))
        return str(rows[0][0]) if rows else None

    def record_content_hash(self, name: str, recipe: str, sha256: str) -> None:
        with _refusing(self.path), self._db:
            self._db.execute("INSERT OR REPLACE INTO content VALUES (?, ?, ?)", (name, recipe, sha256))

    def digest(self) -> str:
        """sha256 over every measurement in a fixed order: the same evidence, the same digest."""
        total = hashlib.sha256()
        query = (
            "SELECT variant, text, ctx, engine, metric, chunk, nll FROM series "
            "JOIN chunk ON chunk.series = series.id ORDER BY variant, text, ctx, engine, metric, chunk"
        )
        for *key, nll in self._rows(query):
            total.update(repr(key).encode())
            total.update(nll)
        return total.hexdigest()

    def n_rows(self) -> int:
        """How many chunks were ever measured."""
        ((count,),) = self._rows("SELECT count(*) FROM chunk")
        return int(count)

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
