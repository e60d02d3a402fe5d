"""Keeps the answers: one JSON line a question, written once and never changed, so that benchmarks resume."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import msgspec
from filelock import FileLock, Timeout

from cerebellum.bench.answers import Known
from cerebellum.bench.artifacts import Answer
from cerebellum.codec import as_json, write_json
from cerebellum.errors import BadInput
from cerebellum.files import make_folder, write_refusal


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Holds the folder for this process alone and makes it where it is missing.

    Two benches at once would ask every question twice. Raises BadInput where another one is at work.
    """
    try:
        make_folder(folder)
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise BadInput(f"{folder}: another bench is at work in it; wait, or use -o") from error


class Answers:
    """Holds the answers of one model to one benchmark in one protocol, in memory and in a file.

    The file is named by ``key``: everything that can change an answer and nothing else. What the key was is
    written beside it. A last line that a crash cut off is dropped, and its question alone is asked again.
    ``with`` syncs the file to the disk and closes it. Raises BadInput for a damaged line.
    """

    def __init__(self, folder: Path, name: str, key: Mapping[str, str | int], wanted: type[Answer]) -> None:
        canonical = json.dumps(key, sort_keys=True, ensure_ascii=False)
        digest = hashlib.sha256(canonical.encode()).hexdigest()
        self.path = folder / f"{name}.{digest[:12]}.jsonl"
        self.by_id: dict[str, Answer] = {}
        make_folder(folder)
        try:
            self._stream: BinaryIO = open(self.path, "a+b")  # noqa: SIM115 - closed by __exit__
        except OSError as error:
            raise write_refusal(self.path, error) from error
        try:
            write_json(self.path.with_suffix(".key.json"), key)
            self._read(wanted)
        except BaseException:
            self._stream.close()
            raise

    def _read(self, wanted: type[Answer]) -> None:
        """Reads all whole lines and cuts off what follows the last of them."""
        self._stream.seek(0)
        good = 0
        for number, line in enumerate(self._stream, 1):
            if not line.endswith(b"\n"):
                break
            try:
                answer = msgspec.json.decode(line, type=wanted)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise BadInput(
                    f"{self.path}: line {number} is damaged ({error}); remove the line or the file"
                ) from error
            self.by_id[answer.id] = answer
            good += len(line)
        self._stream.truncate(good)

    @property
    def known(self) -> Known:
        """Returns which questions have their answers, in which words and with which labels."""
        return {id: (answer.prompt_sha256, dict(answer.golds)) for id, answer in self.by_id.items()}

    def append(self, answer: Answer) -> None:
        """Writes one finished answer; BadInput where the disk has no room for it."""
        line = json.dumps(as_json(answer), ensure_ascii=False, allow_nan=False) + "\n"
        try:
            self._stream.write(line.encode())
            self._stream.flush()
        except OSError as error:
            raise write_refusal(self.path, error) from error
        self.by_id[answer.id] = answer

    def __enter__(self) -> Answers:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
