"""A disk that fails at its n-th step: with no space, with an I/O error, or as if the process were killed there."""

from __future__ import annotations

import errno
import io
import os
import sqlite3
from pathlib import Path
from typing import Any, BinaryIO

from cerebellum.files import Disk

ERRORS = {"full": errno.ENOSPC, "broken": errno.EIO}
CRASH = "crash"
FAULTS = (*ERRORS, CRASH)


class Crashed(BaseException):
    """The process is gone: nothing that would clean up after it may still change the disk."""


class FaultyDisk(Disk):
    """Counts steps in ``steps`` and fails at step ``at`` (from 0) with ``fault``; a crash fails all later ones too."""

    def __init__(self, at: int | None = None, fault: str = "full") -> None:
        self.at = at
        self.fault = fault
        self.steps: list[str] = []

    def step(self, what: str) -> None:
        number = len(self.steps)
        self.steps.append(what)
        if self.at is None or number < self.at:
            return
        if self.fault == CRASH:
            raise Crashed
        if number == self.at:
            raise OSError(ERRORS[self.fault], os.strerror(ERRORS[self.fault]))

    def create(self, path: Path) -> BinaryIO:
        self.step("create")
        return io.BufferedWriter(_Raw(super().create(path), self))  # type: ignore[return-value]

    def sync(self, stream: BinaryIO) -> None:
        stream.flush()
        self.step("sync")

    def replace(self, source: Path, target: Path) -> None:
        self.step("replace")
        super().replace(source, target)

    def unlink(self, path: Path) -> None:
        self.step("unlink")
        super().unlink(path)

    def make_folder(self, path: Path) -> None:
        self.step("make_folder")
        super().make_folder(path)

    def remove_tree(self, path: Path) -> None:
        """Fails in silence, as the real one does: a tree of ours that is left is found by the next run."""
        try:
            self.step("remove_tree")
        except OSError:
            return
        super().remove_tree(path)

    def sync_folder(self, path: Path) -> None:
        """Fails in silence where the real one does; a crash between rename and this is a moment of its own."""
        try:
            self.step("sync_folder")
        except OSError:
            return

    def commit(self, path: Path) -> None:
        """Fails as SQLite does: it writes by itself, and says in its own words what went wrong."""
        try:
            self.step("commit")
        except OSError as error:
            raise sqlite3.OperationalError("database or disk is full") from error


class _Raw(io.RawIOBase):
    """Writes are steps of the disk; one that fails leaves half of its bytes, as a full disk does."""

    def __init__(self, stream: BinaryIO, disk: FaultyDisk) -> None:
        self._stream = stream
        self._disk = disk

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            self._disk.step("write")
        except BaseException:
            self._stream.write(view[: len(view) // 2])
            self._stream.flush()
            raise
        self._stream.write(view)
        return len(view)

    def close(self) -> None:
        self._stream.close()
        super().close()
