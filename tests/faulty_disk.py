"""A disk that fails at its n-th step, in one of six ways that a disk, a signal, a person or a kill makes it fail."""

from __future__ import annotations

import errno
import io
import os
import sqlite3
from pathlib import Path
from typing import Any, BinaryIO

from cerebellum.files import Disk

ERRORS = {"full": errno.ENOSPC, "stays full": errno.ENOSPC, "broken": errno.EIO, "interrupted": errno.EINTR}
CTRL_C = "ctrl-c"
CRASH = "crash"
FAULTS = (*ERRORS, CTRL_C, CRASH)
"""``full``, ``broken`` and ``interrupted`` fail one step, by ENOSPC, EIO and EINTR; ``stays full`` every later one too
that wants space; ``ctrl-c`` is a KeyboardInterrupt; a ``crash`` ends all, and nothing is cleaned up after it.
"""
_WANT_SPACE = frozenset({"create", "write", "sync", "make_folder", "link", "commit"})


class Crashed(BaseException):
    """The process is gone: nothing that would clean up after it may still change the disk."""


class FaultyDisk(Disk):
    """Counts steps in ``steps`` and fails at step ``at`` (from 0) with ``fault``."""

    def __init__(self, at: int | None = None, fault: str = "full") -> None:
        self.at = at
        self.fault = fault
        self.steps: list[str] = []

    def before(self, step: str) -> None:
        number = len(self.steps)
        self.steps.append(step)
        if self.at is None or number < self.at:
            return
        if self.fault == CRASH:
            raise Crashed
        if number != self.at and not (self.fault == "stays full" and step in _WANT_SPACE):
            return
        if self.fault == CTRL_C:
            raise KeyboardInterrupt
        raise OSError(ERRORS[self.fault], os.strerror(ERRORS[self.fault]))

    def create(self, path: Path) -> BinaryIO:
        return _Writer(_Raw(super().create(path), self))  # type: ignore[return-value]

    def sync(self, stream: BinaryIO) -> None:
        """Waits for no disk, which would only take time here: nobody pulls the plug of a test."""
        stream.flush()
        self._take("sync", lambda: None)

    def commit(self, path: Path) -> None:
        """Fails as SQLite does: it writes by itself, and says in its own words what went wrong."""
        try:
            super().commit(path)
        except OSError as error:
            full = error.errno == errno.ENOSPC
            raise sqlite3.OperationalError(
                "database or disk is full" if full else "disk I/O error"
            ) from error


class _Writer(io.BufferedWriter):
    """Drops what it still holds where its process is gone, instead of writing it when it is collected."""

    def __del__(self) -> None:
        self.raw.close()


class _Raw(io.RawIOBase):
    """Writes are steps of the disk; one that fails leaves half of its bytes, as a full disk does.

    A write that a signal interrupts has written nothing, and is called again by Python's own buffer.
    """

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
            self._disk.before("write")
        except InterruptedError:
            raise
        except BaseException:
            self._stream.write(view[: len(view) // 2])
            self._stream.flush()
            raise
        self._stream.write(view)
        return len(view)

    def close(self) -> None:
        self._stream.close()
        super().close()
