"""Stores measurements in one SQLite file; a row is written when its chunk is finished and never changed.

A measurement is keyed by everything that can change it and nothing else: the bytes of the shards, the text,
the chunk length, the engine's identity and the version of the metric. A run that was stopped goes on from
what is here, and nothing is measured twice.
"""

from __future__ import annotations

import hashlib
import sqlite3
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cerebellum import files
from cerebellum.errors import BadInput

SCHEMA_VERSION = 2  # 1: first release; 2: entropies, whose table an older ledger gets when it is opened
METRIC_VERSION = 1  # 1: per-token NLL of the second half of each chunk, float32 nats

_ENTROPY = """
-- How unsure a model's predictions are, for the chunks that it was asked of: the source's, on the report text.
CREATE TABLE entropy (
    series INTEGER NOT NULL REFERENCES series (id),
    chunk  INTEGER NOT NULL,
    nats   BLOB NOT NULL,      -- float32 little-endian nats, one for each scored token
    PRIMARY KEY (series, chunk)
) WITHOUT ROWID;
"""

_SEAL = """
-- What a row of the other tables held when it was written, so that a bit that flips on the disk is noticed. An older
-- Cerebellum writes none and ignores them; a row without one is taken as it is.
CREATE TABLE IF NOT EXISTS seal (
    series INTEGER NOT NULL,
    base   INTEGER NOT NULL,   -- 0: the chunk's NLL, -1: its entropy, else the divergence from this base
    chunk  INTEGER NOT NULL,
    crc    INTEGER NOT NULL,   -- CRC-32 of the keys in words and of the values
    PRIMARY KEY (series, base, chunk)
) WITHOUT ROWID;
"""
_NLL = 0
_UNSURE = -1

SCHEMA = (
    """
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
    + _ENTROPY
)

Vector = NDArray[np.float64]
Matrix = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class SeriesKey:
    """Names a series of measurements by everything that can change it.

    ``variant`` and ``text`` are SHA-256 digests of content, ``ctx`` counts tokens in a chunk and ``engine``
    names the build and device of llama.cpp. ``label`` is for people only and no part of the key.
    """

    variant: str
    text: str
    ctx: int
    engine: str
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Holds how far a chunk's predictions are from those of a base series, token by token.

    ``kld`` is the KL divergence in nats and ``same_top`` whether both models have the same likeliest token,
    each over the chunk's scored tokens.
    """

    base_series: int
    kld: NDArray[np.floating]
    same_top: NDArray[np.bool_]


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Turns SQLite's errors (a full disk, damaged pages) into one BadInput that names the ledger."""
    try:
        yield
    except sqlite3.IntegrityError:
        raise  # a second measurement of the same chunk: a bug, not bad input
    except (sqlite3.DatabaseError, UnicodeError) as error:  # the words of an error can be damaged, too
        raise BadInput(f"{path}: the ledger cannot be used ({error}); free space, or move it away") from error


class Ledger:
    """Opens the ledger at ``path``, or makes one where there is none; ``with`` closes it.

    Every ``record`` is one commit, so a finished chunk outlives a crash of the program; a power failure may take the
    last commits and leaves all before them whole (SQLite's "synchronous = NORMAL" with a write-ahead log), for to wait
    for the disk at every chunk would cost a GPU a tenth of its time. Raises BadInput where the file is no
    ledger, or one of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._measured: dict[int, set[int]] = {}
        self._diverged: dict[tuple[int, int], set[int]] = {}
        self._keys: dict[int, str] = {}
        try:
            self._db = sqlite3.connect(path)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._prepare()
        except (sqlite3.DatabaseError, UnicodeError) as error:
            raise BadInput(f"{path}: not a usable ledger ({error}); move it away to start anew") from error

    def _prepare(self) -> None:
        """Makes the tables in a new file, or those that an older one lacks; refuses any other schema version."""
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version == 0:
            with self._db:
                self._db.executescript(f"BEGIN;{SCHEMA}PRAGMA user_version = {SCHEMA_VERSION};COMMIT;")
        elif version == 1:
            with self._db:
                self._db.executescript(f"BEGIN;{_ENTROPY}PRAGMA user_version = {SCHEMA_VERSION};COMMIT;")
        elif version != SCHEMA_VERSION:
            raise BadInput(
                f"{self.path}: ledger version {version}, this Cerebellum reads {SCHEMA_VERSION}; "
                "use the release that wrote it, or another folder"
            )
        with self._db:
            self._db.execute(_SEAL)

    def _rows(self, query: str, values: tuple[object, ...] = ()) -> list[tuple[Any, ...]]:
        with _refusing(self.path):
            return self._db.execute(query, values).fetchall()

    @contextmanager
    def _commit(self) -> Iterator[None]:
        """Runs a block as one transaction, which is on the disk when the block ends, or never was."""
        with _refusing(self.path), self._db:
            yield
            files.DISK.commit(self.path)

    def series(self, key: SeriesKey) -> int:
        """Returns the row id of the series with this key, which is made on first use."""
        values = (key.variant, key.text, key.ctx, key.engine, METRIC_VERSION)
        with self._commit():
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
        """Returns the indices of the chunks of a series that are in the ledger already."""
        rows = self._rows("SELECT chunk FROM chunk WHERE series=?", (series,))
        if not all(isinstance(chunk, int) for (chunk,) in rows):
            raise self._damaged("a chunk has no number")
        return frozenset(chunk for (chunk,) in rows)

    def lacking(self, series: int, chunks: Iterable[int]) -> list[int]:
        """Returns those of ``chunks`` that were never measured, in their order.

        It is asked often and reads the file once: whoever holds the ledger is its only writer.
        """
        if series not in self._measured:
            self._measured[series] = set(self.measured(series))
        return [chunk for chunk in chunks if chunk not in self._measured[series]]

    def undiverged(self, series: int, base_series: int, chunks: Iterable[int]) -> list[int]:
        """Returns those of ``chunks`` that were never compared with this base, in their order."""
        pair = (series, base_series)
        if pair not in self._diverged:
            self._diverged[pair] = set(self.diverged(series, base_series))
        return [chunk for chunk in chunks if chunk not in self._diverged[pair]]

    def nll(self, series: int, chunks: Iterable[int]) -> Matrix:
        """Returns the negative log-likelihoods of ``chunks`` in their order: (chunks, scored tokens), in
        nats.

        The vectors are float32. Raises KeyError for a chunk that was not measured.
        """
        wanted = list(chunks)
        rows = dict(self._rows("SELECT chunk, nll FROM chunk WHERE series=?", (series,)))
        found = [self._vector(rows[chunk]) for chunk in wanted]
        self._check_seals(series, _NLL, [(chunk, rows[chunk]) for chunk in wanted])
        if len({len(vector) for vector in found}) > 1:
            raise self._damaged("chunks of one text have different numbers of tokens")
        return np.stack(found)

    def _vector(self, blob: object, dtype: str = "<f4") -> NDArray[Any]:
        """Returns the values of a blob; BadInput where no ``record`` can have written it."""
        if not isinstance(blob, bytes) or not blob or len(blob) % np.dtype(dtype).itemsize:
            raise self._damaged("a measurement has not the length of one")
        return np.frombuffer(blob, dtype)

    def _damaged(self, why: str) -> BadInput:
        return BadInput(f"{self.path}: is damaged ({why}); move it away to measure anew")

    def record(
        self,
        series: int,
        chunk: int,
        nll: NDArray[np.floating],
        divergence: Divergence | None = None,
        entropy: NDArray[np.floating] | None = None,
    ) -> None:
        """Commits one finished chunk with its divergence and the entropy of its predictions, where there are any, in
        the same commit.

        ``nll`` and ``entropy`` are in nats for each scored token. A second measurement of the same chunk is a bug
        and raises ``sqlite3.IntegrityError``.
        """
        blob = np.asarray(nll, "<f4").tobytes()
        with self._commit():
            self._db.execute("INSERT INTO chunk VALUES (?, ?, ?)", (series, chunk, blob))
            self._seal(series, _NLL, chunk, blob)
            if divergence is not None:
                self._insert_divergence(series, chunk, divergence)
            if entropy is not None:
                self._insert_entropy(series, chunk, entropy)
        self._measured.get(series, set()).add(chunk)
        self._note_divergence(series, chunk, divergence)

    def _note_divergence(self, series: int, chunk: int, divergence: Divergence | None) -> None:
        if divergence is not None:
            self._diverged.get((series, divergence.base_series), set()).add(chunk)

    def record_entropy(self, series: int, chunk: int, nats: NDArray[np.floating]) -> None:
        """Commits how unsure the predictions are of a chunk whose NLL is known already; one that has it keeps it."""
        with self._commit():
            self._insert_entropy(series, chunk, nats)

    def _insert_entropy(self, series: int, chunk: int, nats: NDArray[np.floating]) -> None:
        blob = np.asarray(nats, "<f4").tobytes()
        added = self._db.execute("INSERT OR IGNORE INTO entropy VALUES (?, ?, ?)", (series, chunk, blob))
        if added.rowcount == 1:
            self._seal(series, _UNSURE, chunk, blob)

    def entropies(self, series: int) -> dict[int, float]:
        """Returns the mean entropy of the predictions, nats a token, of every chunk that it was asked of."""
        rows = self._rows("SELECT chunk, nats FROM entropy WHERE series=?", (series,))
        found = {chunk: float(self._vector(nats).mean(dtype=np.float64)) for chunk, nats in rows}
        self._check_seals(series, _UNSURE, rows)
        return found

    def record_divergence(self, series: int, chunk: int, divergence: Divergence) -> None:
        """Commits the divergence of a chunk whose NLL is known already, as from another reference."""
        with self._commit():
            self._insert_divergence(series, chunk, divergence)
        self._note_divergence(series, chunk, divergence)

    def _insert_divergence(self, series: int, chunk: int, divergence: Divergence) -> None:
        kld = np.asarray(divergence.kld, "<f4").tobytes()
        same = np.asarray(divergence.same_top, np.uint8).tobytes()
        row = (series, divergence.base_series, chunk, kld, same)
        self._db.execute("INSERT INTO divergence VALUES (?, ?, ?, ?, ?)", row)
        self._seal(series, divergence.base_series, chunk, kld + same)

    def diverged(self, series: int, base_series: int) -> dict[int, float]:
        """Returns the mean KL divergence in nats/token of every chunk that has one against this base."""
        rows = self._divergence_rows(series, base_series)
        return {chunk: float(self._vector(kld).mean(dtype=np.float64)) for chunk, kld, _ in rows}

    def divergence(self, series: int, base_series: int, chunks: Iterable[int]) -> tuple[Vector, Vector]:
        """Returns the mean KL divergence and the share of equal top tokens, each (n,), by chunk.

        Only those of ``chunks`` with a divergence from this base are among them; the KL divergence is in nats/token.
        """
        wanted = frozenset(chunks)
        rows = [row for row in self._divergence_rows(series, base_series) if row[0] in wanted]
        kld = np.array([self._vector(kld).mean(dtype=np.float64) for _, kld, _ in rows], np.float64)
        same = np.array([self._vector(same, "u1").mean() for _, _, same in rows], np.float64)
        return kld, same

    def divergences(self, series: int, base_series: int, chunks: Iterable[int]) -> tuple[Matrix, Matrix]:
        """Returns KL divergences (nats) and whether top tokens agree (0 or 1), each (chunks, scored tokens).

        They are of ``chunks`` in their order, from this base. Raises KeyError for one that was not compared.
        """
        rows = {chunk: (kld, same) for chunk, kld, same in self._divergence_rows(series, base_series)}
        wanted = [rows[chunk] for chunk in chunks]
        kld = [self._vector(kld) for kld, _ in wanted]
        same = [self._vector(same, "u1").astype(np.float32) for _, same in wanted]
        if len({len(vector) for vector in (*kld, *same)}) > 1:
            raise self._damaged("chunks of one text have different numbers of tokens")
        return np.stack(kld), np.stack(same)

    def _divergence_rows(self, series: int, base_series: int) -> list[tuple[Any, ...]]:
        """Returns (chunk, kld, same) of every chunk that was compared with this base, as they were written."""
        query = "SELECT chunk, kld, same FROM divergence WHERE series=? AND base=? ORDER BY chunk"
        rows = self._rows(query, (series, base_series))
        for _, kld, same in rows:
            if len(self._vector(kld)) != len(self._vector(same, "u1")):
                raise self._damaged("a divergence has not as many values as tokens")
        self._check_seals(series, base_series, [(chunk, kld + same) for chunk, kld, same in rows])
        return rows

    def _seal(self, series: int, base: int, chunk: int, content: bytes) -> None:
        crc = self._crc(series, base, chunk, content)
        self._db.execute("INSERT OR IGNORE INTO seal VALUES (?, ?, ?, ?)", (series, base, chunk, crc))

    def _check_seals(self, series: int, base: int, rows: Iterable[tuple[Any, ...]]) -> None:
        """Raises BadInput where a row is not what was written."""
        query = "SELECT chunk, crc FROM seal WHERE series=? AND base=?"
        seals = dict(self._rows(query, (series, base)))
        for chunk, content in rows:
            if seals and seals.get(chunk) not in (None, self._crc(series, base, chunk, content)):
                raise self._damaged(f"the measurement of chunk {chunk!a} is not what was written")

    def _crc(self, series: int, base: int, chunk: int, content: bytes) -> int:
        """Returns the CRC-32 of a row's values with the keys in words, so that rows that change places are noticed."""
        words = f"{self._key(series)} {self._key(base) if base > 0 else base} {chunk} "
        return zlib.crc32(content, zlib.crc32(words.encode()))

    def _key(self, series: int) -> str:
        """Returns what a series is of, in words."""
        if series not in self._keys:
            query = "SELECT variant, text, ctx, engine, metric FROM series WHERE id=?"
            self._keys[series] = repr(self._rows(query, (series,)))
        return self._keys[series]

    def n_chunks(self) -> int:
        """Returns how many chunks were ever measured, over all variants and texts."""
        ((found,),) = self._rows("SELECT COUNT(*) FROM chunk")
        return int(found)

    def knows(self, variant: str) -> bool:
        """Says whether any chunk of any text was ever measured on the weights with this digest."""
        query = "SELECT 1 FROM series JOIN chunk ON chunk.series = series.id WHERE series.variant = ? LIMIT 1"
        return bool(self._rows(query, (variant,)))

    def content_hash(self, name: str, recipe: str) -> str | None:
        """Returns the SHA-256 that a file of this name and recipe had when it was read, or None."""
        rows = self._rows("SELECT sha256 FROM content WHERE name=? AND recipe=?", (name, recipe))
        return str(rows[0][0]) if rows else None

    def record_content_hash(self, name: str, recipe: str, sha256: str) -> None:
        """Remembers the SHA-256 of a file in the shards folder under the recipe that it was made from."""
        with self._commit():
            self._db.execute("INSERT OR REPLACE INTO content VALUES (?, ?, ?)", (name, recipe, sha256))

    def digest(self) -> str:
        """Returns the SHA-256 over every measurement in a fixed order: the same evidence, the same digest."""
        total = hashlib.sha256()
        query = (
            "SELECT variant, text, ctx, engine, metric, chunk, nll FROM series "
            "JOIN chunk ON chunk.series = series.id ORDER BY variant, text, ctx, engine, metric, chunk"
        )
        for *key, nll in self._rows(query):
            total.update(repr(key).encode())
            total.update(self._vector(nll).tobytes())
        return total.hexdigest()

    def settle(self) -> None:
        """Brings what SQLite keeps beside the ledger into it, so that this one file is all of it.

        Call it before the file is copied or uploaded; it does nothing while another process reads.
        """
        self._rows("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
