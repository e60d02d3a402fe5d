"""One JSON line a question, written when it is answered and never changed: benchmarks resume from it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from cerebellum.errors import BadInput
from cerebellum.files import atomic_write_text, write_refusal

Record = Mapping[str, Any]


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """The folder for this process alone, made where missing: two at once would ask everything twice."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise BadInput(f"{folder}: another bench is at work in it; wait, or use -o") from error


class Evidence:
    """The answers of one model to one benchmark in one protocol; ``with`` closes and syncs the file.

    The file is named by ``key``: everything that can change an answer and nothing else. What the key
    was is written beside it. A last line that was cut off by a crash is dropped; its question is asked
    again, and no other.
    """

    def __init__(self, folder: Path, name: str, key: Mapping[str, Any]) -> None:
        canonical = json.dumps(key, sort_keys=True, ensure_ascii=False)
        digest = hashlib.sha256(canonical.encode()).hexdigest()
        self.path = folder / f"{name}.{digest[:12]}.jsonl"
        self.records: dict[str, Record] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._stream: BinaryIO = open(self.path, "a+b")  # noqa: SIM115 - closed by __exit__
        except OSError as error:
            raise write_refusal(self.path, error) from error
        try:
            atomic_write_text(self.path.with_suffix(".key.json"), json.dumps(key, indent=2) + "\n")
            self._read()
        except BaseException:
            self._stream.close()
            raise

    def _read(self) -> None:
        self._stream.seek(0)
        good = 0
        for number, line in enumerate(self._stream, 1):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
                self.records[record["id"]] = record
            except (ValueError, KeyError, TypeError) as error:
                raise BadInput(
                    f"{self.path}: line {number} is damaged; remove the line or the file"
                ) from error
            good += len(line)
        self._stream.truncate(good)

    def known(self, question: str, prompt_sha256: str, golds: Mapping[str, int]) -> bool:
        """Whether exactly this question, with these labels, has its answer already."""
        record = self.records.get(question)
        return (
            record is not None and record["prompt_sha256"] == prompt_sha256 and record["golds"] == dict(golds)
        )

    def append(self, record: Record) -> None:
        line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            self._stream.write(line.encode())
            self._stream.flush()
        except OSError as error:
            raise write_refusal(self.path, error) from error
        self.records[record["id"]] = record

    def __enter__(self) -> Evidence:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
