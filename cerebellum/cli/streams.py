"""stdin, stdout and stderr as a process may find them: closed, full, a pipe whose reader left, plain ASCII."""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO, cast

from cerebellum.errors import BadInput

_STREAMS = ("stdin", "stdout", "stderr")


def open_missing_streams() -> None:
    """Opens /dev/null in place of a standard stream that was closed.

    Otherwise the next file that is opened, a finished model say, gets the number of stdout, and whatever a C
    library prints goes into it.
    """
    for descriptor, name in enumerate(_STREAMS):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
        if getattr(sys, name) is None:
            mode = "r" if descriptor == 0 else "w"
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def keep_stdout_for_answers() -> None:
    """Sends what C libraries print to stderr: HiGHS writes a line to stdout now and then, told or not.

    What an encoding cannot hold is written as its number, because a name must not end a run that is done.
    """
    try:
        real = sys.stdout.fileno() == 1
    except (OSError, ValueError):  # a stand-in without a file, or closed
        return
    if real:
        sys.stdout.flush()
        kept = os.dup(1)
        os.dup2(2, 1)
        sys.stdout = os.fdopen(kept, "w", encoding=sys.stdout.encoding, errors="backslashreplace")


class _OfMainThread:
    """Stands for stdout: what the main thread writes goes there, what any other thread does goes to stderr."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes to one of the two."""
        is_main = threading.current_thread() is threading.main_thread()
        return (self._stream if is_main else sys.stderr).write(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def keep_stdout_for_this_thread() -> None:
    """Sends to stderr what threads of libraries print: Ray tells of dead workers on stdout, asked or not."""
    if not isinstance(sys.stdout, _OfMainThread):
        sys.stdout = cast(TextIO, _OfMainThread(sys.stdout))


@contextmanager
def answering() -> Iterator[None]:
    """Prints an answer, and makes sure that it was taken; the process then has nothing left to say.

    A reader that left (`| head`) is no fault of ours and is passed over in silence. Raises BadInput where the
    answer could not be written, as on a full disk.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        _say_no_more()
    except OSError as error:
        if not _is_of_stdout(error):
            raise
        _say_no_more()
        raise BadInput(
            f"stdout: the answer cannot be written ({error.strerror or error}); the work itself is done"
        ) from error


def _is_of_stdout(error: OSError) -> bool:
    """Says whether an error can be of writing an answer: those of files name their file."""
    return error.filename is None and error.errno in (errno.ENOSPC, errno.EIO, errno.EBADF, errno.EPIPE)


def _say_no_more() -> None:
    with suppress(OSError, ValueError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)
